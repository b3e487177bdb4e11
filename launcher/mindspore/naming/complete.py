"""Whether weights that were renamed are all of a model, for conversions that no load follows.

A load compares the names with those of the model. A conversion has config.json alone: the layers of
a model are of a few kinds, so that a layer with some of the tensors of another one lacks the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from launcher.errors import UserError
from launcher.mindspore.naming.sizes import Sizes
from launcher.weights.optimizer_state import is_optimizer_state

NAMED = 4
_IN_LAYER = re.compile(r"(.*\.(?:layers|h)\.)(\d+)\.(.+)")
_ENDS = {
    "embedding": re.compile(r".*\b(embed_tokens|word_embeddings)\.weight"),
    "final norm": re.compile(r"(model\.norm|transformer\.ln_f|.*\.final_layernorm)\.weight"),
}
_BUFFER = "inv_freq"
"""In old files; a model has no place for it."""


def check_complete(path: Path, found: Collection[str], rest: Iterable[str], sizes: Sizes) -> None:
    """Check that the tensors at `path` are all of a model and nothing else.

    `found`: their Hugging Face names; `rest`: names without one. Raises `UserError`.
    """
    unknown = [name for name in rest if not name.endswith(_BUFFER)]
    if unknown:
        more = f" and {len(unknown) - NAMED} more" * (len(unknown) > NAMED)
        raise UserError(
            f"{', '.join(f'`{name}`' for name in unknown[:NAMED])}{more} cannot be named",
            where=str(path),
            rule=f"names exist for the tensors of {sizes.family} with {sizes.layers} layers"
            + (f", {sizes.experts} experts" if sizes.experts else ""),
            advice="Give the config.json of these weights",
        )
    names = [name for name in found if not is_optimizer_state(name)]
    missing = _missing(names, sizes.layers) if names else None
    if missing is not None:
        raise UserError(
            f"{path} lacks {missing}",
            rule=f"all tensors of a model with {sizes.layers} layers are converted together",
            advice="Copy the missing file, give the folder of all files, or the config.json of "
            "these weights",
        )


def _missing(names: list[str], layers: int) -> str | None:
    """A tensor that is missing; None without one."""
    for what, pattern in _ENDS.items():
        if not any(map(pattern.fullmatch, names)):
            return f"the {what}"
    place, parts = _parts(names, layers)
    for of_layer in parts.values():
        kinds = {frozenset(found) for found in of_layer}
        for number, found in enumerate(of_layer):
            fuller = next((kind for kind in kinds if found < kind), None)
            if fuller is not None:
                return f"`{place}{number}.{min(fuller - found)}`"
    return None


def _parts(names: Iterable[str], layers: int) -> tuple[str, dict[str, list[set[str]]]]:
    """(what the names of layers begin with; part of a layer, such as `mlp`, to the names in it of
    each layer)."""
    place, parts = "", dict[str, list[set[str]]]()
    for name in names:
        match = _IN_LAYER.fullmatch(name)
        if match is None or int(match[2]) >= layers:
            continue
        place = match[1]
        block = match[3].rpartition(".")[0]
        part = block.partition(".")[0] if "." in block else ""
        parts.setdefault(part, [set() for _ in range(layers)])[int(match[2])].add(match[3])
    return place, parts
