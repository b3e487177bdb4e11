"""Directories of PEFT: the tensors of an adapter, under the names of rank files and back.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     in adapter_model.safetensors
                     model.layers.0.self_attn.q_proj.lora_A.weight     in rank files

Owns these names, and modules that are one in files of Hugging Face and several in the model. The
adapter of `gate_up_proj` has one A and the rows of gate and up in B; that of gate and up has two:

    A   = [A gate]        B   = [B gate    0   ]     rank 2 r
          [A up  ]              [   0    B up  ]

Torch-free. Invariants: what is written computes the same as what was read; the scaling of each
module stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import UserError
from launcher.extensions import JOINED_MODULES, installed
from launcher.weights.adapters.config import CONFIG_NAME, Content, is_target, rank_of, scaling_of
from launcher.weights.adapters.found import WEIGHT_NAMES
from launcher.weights.adapters.tensors import Tensor, read_tensors
from launcher.weights.formats.safetensors import in_file_order
from launcher.weights.geometry import Span, full_side, moved
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.pieces import Pieces
from launcher.weights.source import Source, open_complete
from launcher.weights.streaming.portion import Words
from launcher.weights.streaming.write import Part, write_file

PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_BELOW = ".base_layer"
"""In the name of a weight that has an adapter."""
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


def open_peft(directory: Path, family: str, config: Content | None = None) -> Source:
    """The tensors of a directory of PEFT under the names of rank files of a `family` (model_type).

    Raises `UserError` for files that are damaged, or hold something else; also where they are not
    those of the description `config`, whose types are checked.
    """
    file = next((directory / name for name in WEIGHT_NAMES if (directory / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{directory} has no {WEIGHT_NAMES[0]}",
            rule=f"a directory of PEFT has {CONFIG_NAME} and the weights that it describes",
            advice="Copy the directory again",
        )
    source = open_complete(file)
    _check_names(source)
    names = {name: name.removeprefix(PREFIX).replace(_BELOW, "") for name in source.tensors}
    renamed = source.renamed(names)
    if config is not None:
        _check_described(renamed, config)
    return _apart(renamed, family)


def _check_described(source: Source, config: Content) -> None:
    """Check that the modules with matrices are those of target_modules, of the described ranks."""
    for module in modules_of(source.tensors):
        rank, shape = rank_of(config, module), source.shape(module + A)
        if not is_target(config, module) or shape[:1] != (rank,):
            what = f"`{module}{A}` is {list(shape)}, "
            raise UserError(
                what + (f"of rank {rank} in {CONFIG_NAME}" if is_target(config, module) else
                        f"and target_modules in {CONFIG_NAME} does not name this layer"),
                where=str(source.path), rule="both files describe one adapter",
                advice="Copy the directory again",
            )  # fmt: skip


def _check_names(source: Source) -> None:
    for name in source.tensors:
        if any(part in name for part in _EMBEDDING):
            raise UserError(
                f"{source.path} holds `{name}`",
                rule="adapters of embeddings are not built: those of linear layers are",
                advice="Train the embedding in full (modules_to_save)",
            )
    others = [name for name in source.tensors if not name.startswith(PREFIX)]
    if others:
        raise UserError(
            f"{source.path} holds `{others[0]}`",
            rule=f"names in files of PEFT begin with {PREFIX}",
            advice="Save the adapter with PEFT (save_pretrained)",
        )


def check_ties(
    names: Collection[str], config: Content, ties: Iterable[Collection[str]], where: str
) -> None:
    """Check that an adapter of PEFT, with tensors of these `names`, leaves tied weights the same:
    PEFT unties them where one end alone is in modules_to_save, unless its ensure_weight_tying is
    set. `ties`: names of weights that are one in the model. Raises `UserError`."""
    for ends in ties:
        held = [name for name in ends if name in names]
        if len(held) == 1 and not config.get("ensure_weight_tying"):
            raise UserError(
                f"of the tied embeddings it holds `{held[0]}` alone", where=where,
                rule="PEFT unties them then, and the model has one tensor for both",
                advice="Train it with ensure_weight_tying (PEFT), or merge it into its base with "
                "PEFT (merge_and_unload), save that with tie_word_embeddings false, and load it",
            )  # fmt: skip


def _joined(family: str) -> Mapping[str, tuple[str, ...]]:
    tables: Mapping[str, Mapping[str, tuple[str, ...]]] = installed(JOINED_MODULES)
    return tables.get(family, {})


def _apart(source: Source, family: str) -> Source:
    """`source` with the modules of the model: each part has the same A, and its rows of B."""
    tensors: dict[str, Pieces] = {}
    for name, pieces in source.tensors.items():
        found = _place(name, family)
        if found is None:
            tensors[name] = pieces
            continue
        place, parts, kind = found
        shape = source.shape(name)
        rows = shape[0] // len(parts)
        for number, part in enumerate(parts):
            full_part = full_side((rows, *shape[1:]))
            cut = full_side(shape)
            cut = cut._replace(index=(Span(number * rows, rows), *cut.index[1:]))
            own = pieces if kind == A else Pieces(moved(pieces, cut, full_part, range(len(shape))))
            tensors[f"{place}{part}{kind}"] = own
    return replace(source, tensors=tensors)


def _place(name: str, family: str) -> tuple[str, tuple[str, ...], str] | None:
    """Of a tensor of a module that is several in the model: what is before its name, those, and
    the kind of tensor. None for others."""
    for joined, parts in _joined(family).items():
        for kind in (A, B, MAGNITUDE, ".weight"):
            place = name.removesuffix(f"{joined}{kind}")
            if place != name and (not place or place.endswith(".")):
                return place, parts, kind
    return None


def write_peft(
    source: Source, config: Content, family: str, directory: Path,
    tied: Mapping[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """Write the adapter of `source`, which has the names of rank files, into `directory`, which
    exists. Optimizer state is left out. `tied`: names of tied weights to those they are tied to;
    PEFT reads both. Returns the names of its tensors. Raises `UserError`, also where what is read
    does not have its checksum."""
    tensors = read_tensors(source, lambda name: not is_optimizer_state(name))
    tensors |= {alias: tensors[name] for alias, name in (tied or {}).items() if name in tensors}
    tensors, content = in_form_of_peft(tensors, config, family)
    parts = [
        Part(f"{PREFIX}{name}", one.dtype, one.words.shape, _reader(one.words))
        for name, one in tensors.items()
    ]
    write_file(directory / WEIGHT_NAMES[0], in_file_order(parts), {"format": "pt"})
    text = json.dumps(content, indent=2, sort_keys=True)
    (directory / CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")
    return [part.name for part in parts]


def _reader(words: Words) -> Callable[[int, int], memoryview]:
    flat = np.ascontiguousarray(words).reshape(-1).view(np.uint8).data
    return lambda start, stop: flat[start:stop]


def in_form_of_peft(
    tensors: Mapping[str, Tensor], config: Content, family: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors with names of rank files, and their description, with modules as files have them."""
    made = dict(tensors)
    ranks, alphas = {**(config.get("rank_pattern") or {})}, {**(config.get("alpha_pattern") or {})}
    names = dict.fromkeys(config["target_modules"])
    for joined, parts in _joined(family).items():
        places = {
            module.removesuffix(part)
            for module in modules_of(tensors) for part in parts if module.endswith(f".{part}")
        }  # fmt: skip
        leaves = [part.rpartition(".")[2] for part in parts]
        names = dict.fromkeys(n for n in names if n.rpartition(".")[2] not in leaves)
        ranks, alphas = (
            {
                name: value
                for name, value in patterns.items()
                if name.rpartition(".")[2] not in leaves
            }
            for patterns in (ranks, alphas)
        )
        factors = {}
        for place in sorted(places):
            module = f"{place}{joined}"
            block, factors[module] = _joined_module(tensors, place, parts, config)
            made = {n: t for n, t in made.items() if not n.startswith(
                tuple(f"{place}{part}.lora_" for part in parts))}  # fmt: skip
            made |= {f"{module}{kind}": tensor for kind, tensor in block.items()}
            names[module] = None
        for module, factor in factors.items():
            rank = made[module + A].words.shape[0]
            ranks[module] = rank
            alphas[module] = factor * (rank**0.5 if config.get("use_rslora") else rank)
        _join_weights(made, joined, parts)
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    content = {**config, "target_modules": sorted(names), **patterns}
    return made, content


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules that have an adapter, from the names of its tensors."""
    return [name.removesuffix(A) for name in names if name.endswith(A)]


def _joined_module(
    tensors: Mapping[str, Tensor], place: str, parts: Sequence[str], config: Content
) -> tuple[dict[str, Tensor], float]:
    """The adapter of a module that is one in files, from those of its parts: tensors by their kind,
    and its factor. A part without one has zeros in B."""
    own = {part: f"{place}{part}" for part in parts if f"{place}{part}{A}" in tensors}
    factors = {part: scaling_of(config, module) for part, module in own.items()}
    factor = next(iter(factors.values()))
    first = tensors[next(iter(own.values())) + A]
    rows = tensors[next(iter(own.values())) + B].words.shape[0]
    low = [tensors[module + A].numbers for module in own.values()]
    high = np.zeros((rows * len(parts), sum(len(a) for a in low)), np.float32)
    column = 0
    for part, module in own.items():
        b, row = tensors[module + B].numbers, parts.index(part) * rows
        high[row : row + rows, column : column + b.shape[1]] = b * (factors[part] / factor)
        column += b.shape[1]
    made = {A: Tensor.of(np.concatenate(low), first.dtype), B: Tensor.of(high, first.dtype)}
    if config.get("use_dora"):
        lengths = [tensors[f"{place}{part}{MAGNITUDE}"].numbers for part in parts
                   if f"{place}{part}{MAGNITUDE}" in tensors]  # fmt: skip
        if len(lengths) < len(parts):
            raise UserError(
                f"{place}{parts[0]} and its neighbours are one module in files, and not all of "
                "them have an adapter",
                rule="with DoRA, rows without an adapter would need their lengths",
                advice="Name all of them in target_modules: " + ", ".join(parts),
            )
        made[MAGNITUDE] = Tensor.of(np.concatenate(lengths), first.dtype)
    return made, factor


def _join_weights(made: dict[str, Tensor], joined: str, parts: Sequence[str]) -> None:
    """Join the weights of modules that are saved in full, in place."""
    places = [
        n.removesuffix(f"{parts[0]}.weight") for n in made if n.endswith(f".{parts[0]}.weight")
    ]
    for place in places:
        weights = [f"{place}{part}.weight" for part in parts]
        if all(name in made for name in weights):
            words = np.concatenate([made[name].words for name in weights])
            made[f"{place}{joined}.weight"] = Tensor(made[weights[0]].dtype, words)
            for name in weights:
                del made[name]
