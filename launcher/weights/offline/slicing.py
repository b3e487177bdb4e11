"""Slicing complete weights, or those of another layout, into the rank files of a new layout.

Owns what the file of each rank gets. Torch-free. Invariants: every tensor of the source is in the
new files, except optimizer state where the layout has none; optimizer state is sharded as its
parameter; the file of rank 0 has tensors that the layout does not know; numbers of the run (step,
epoch) are in the file of every rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.weights.formats.rank_metadata import RankFileMetadata, inventory_of
from launcher.weights.forms import INDEX_NAMES, is_scalar
from launcher.weights.joined import apart
from launcher.weights.log import Log, no_log
from launcher.weights.mxfp4 import packed_of
from launcher.weights.optimizer_state import STATE_PREFIXES, is_optimizer_state
from launcher.weights.ranks.saves import DEFAULT_SUFFIX, MODEL_FOLDER
from launcher.weights.source import Source
from launcher.weights.streaming.new_folder import folder_aside
from launcher.weights.streaming.stream import WORKERS, Output, Progress, stream

NAMED = 8
"""Tensors named in a message."""
PREFIX = "net"
"""Rank files are `net_rank_{rank}-{suffix}.safetensors`."""
SIDE_FILES = (".json", ".txt", ".model", ".jinja")
"""Extensions of configuration and tokenizer files beside weights."""


class RankLayout(Protocol):
    """The interface of a target layout."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def mesh(self) -> Mapping[str, int]:
        """Axis to size; empty where the layout has no named axes."""

    @property
    def has_optimizer(self) -> bool:
        """Whether ranks hold optimizer state; it lies as the parameters do."""

    def boxes(self, rank: int) -> Mapping[str, Box]:
        """Name in files to the box of it that `rank` holds."""


@dataclass(frozen=True)
class Sliced:
    """What a slicing wrote."""

    ranks: int
    tensors: int
    total_bytes: int
    """Of all files, including replicas."""


def slice_weights(
    source: Source,
    layout: RankLayout,
    target: Path,
    *,
    suffix: str = DEFAULT_SUFFIX,
    workers: int = WORKERS,
    overwrite: bool = False,
    progress: Progress | None = None,
    log: Log = no_log,
) -> Sliced:
    """Write the rank files of `layout` from `source` to `target`, a folder that appears complete.

    Raises `UserError` when the layout knows no tensor of the source, for FP8 weights, as rank files
    have no place for scales, and when `target` may not be written.
    """
    packed = packed_of(source.tensors)
    if source.scales or packed:
        kind, name = ("MXFP4", next(iter(packed))) if packed else ("FP8", next(iter(source.scales)))
        raise UserError(
            f"{source.path} holds {kind} weights, such as `{name}`",
            rule="rank files have no place for their block scales",
            advice="Load the complete weights themselves: they are sliced while they are read",
        )
    if not layout.has_optimizer:
        source = _without_optimizer(source, log)
    boxes = [layout.boxes(rank) for rank in range(layout.world_size)]
    source = apart(source, None, wanted={name for of_rank in boxes for name in of_rank})
    held = [_with_optimizer(source, of_rank) for of_rank in boxes]
    known = {name for boxes_of in held for name in boxes_of}
    if not known:
        raise UserError(
            f"the layout knows no tensor of {source.path}",
            rule="layout and weights must be of one model",
            nearest=f"The weights have `{next(iter(source.tensors), 'no tensor')}`",
            advice="Give the strategy or the configuration of a run of this model",
        )
    _place_the_rest(source, held, known, log)
    source = _with_scalars(source, held, log)
    with folder_aside(
        target, source.path, overwrite=overwrite, option="--dst_safetensors_dir"
    ) as folder:
        outputs = [_output(folder, layout, rank, own, source, suffix)
                   for rank, own in enumerate(held)]  # fmt: skip
        for output in outputs:
            output.path.parent.mkdir()
        written = stream(source, outputs, progress, workers=workers)
        # For whoever merges the rank files again.
        beside = source.path if source.path.is_dir() else source.path.parent
        copy_side_files(beside, folder / MODEL_FOLDER / PREFIX)
    return Sliced(layout.world_size, len(source.tensors), written)


def _without_optimizer(source: Source, log: Log) -> Source:
    """The source without optimizer state, for a layout that has none."""
    kept = {n: p for n, p in source.tensors.items() if not is_optimizer_state(n)}
    left_out = len(source.tensors) - len(kept)
    if left_out:
        log(f"left out, the strategy has no optimizer state: {left_out} tensors")
    return replace(source, tensors=kept)


def _with_scalars(source: Source, held: Sequence[dict[str, Box]], log: Log) -> Source:
    """The source with the numbers of the run among its tensors; every rank holds them."""
    scalars = {n: p for n, p in source.extras.items() if is_scalar(n, p[0].shape)}
    others = sorted(source.extras.keys() - scalars.keys())
    for own in held:
        own.update({name: full_box(pieces[0].shape) for name, pieces in scalars.items()})
    if others:
        more = " ..." * (len(others) > NAMED)
        log(f"left out, not part of the model: {', '.join(others[:NAMED])}{more}")
    return replace(source, tensors={**source.tensors, **scalars}, extras={})


def _with_optimizer(source: Source, weights: Mapping[str, Box]) -> dict[str, Box]:
    """The boxes of what the source has: weights, and optimizer state, which is sharded alike."""
    return {
        prefix + name: box
        for name, box in weights.items()
        for prefix in ("", *STATE_PREFIXES)
        if prefix + name in source.tensors and source.shape(prefix + name) == source.shape(name)
    }


def _place_the_rest(
    source: Source, held: Sequence[dict[str, Box]], known: set[str], log: Log
) -> None:
    others = [name for name in source.tensors if name not in known]
    held[0].update({name: full_box(source.shape(name)) for name in others})
    if others:
        log(
            f"warning: the layout does not know {len(others)} of {len(source.tensors)} tensors, "
            f"such as {others[0]}: the file of rank 0 holds all of them"
        )


def _output(
    folder: Path, layout: RankLayout, rank: int, own: Mapping[str, Box], source: Source, suffix: str
) -> Output:
    path = folder / f"rank_{rank}" / f"{PREFIX}_rank_{rank}-{suffix}.safetensors"
    places = {name: (source.shape(name), box) for name, box in own.items()}
    inventory = inventory_of({
        name: source.shape(name) for name in source.tensors
        if not is_scalar(name, source.shape(name))
    })  # fmt: skip
    rank_metadata = RankFileMetadata(
        layout.world_size, rank, dict(layout.mesh), places, inventory=inventory
    )
    metadata = {"format": "pt", "remove_redundancy": "False"}
    return Output(path, {name: (name, box) for name, box in own.items()}, metadata, rank_metadata)


def copy_side_files(origin: Path, target: Path) -> None:
    """Copy configuration, tokenizer and named chat templates beside weights into `target`."""
    beside = [
        path for path in origin.iterdir()
        if path.suffix in SIDE_FILES and path.name not in INDEX_NAMES and path.is_file()
        and not path.name.startswith(".")
    ]  # fmt: skip
    for path in sorted([*beside, *origin.glob("additional_chat_templates/*.jinja")]):
        place = target / path.relative_to(origin)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)
