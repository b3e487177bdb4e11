"""A run of MindSpore: the rank files of one save, and the layouts in its strategy files.

Owns the rank of each file, the pipeline stage of each rank, and the way from a slice and its layout
to a box:

    rank n, in rank_<n>/  =  stage * ranks in a stage + local rank

A strategy has no shapes: a slice and its layout give the global shape. Torch-free.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from launcher.errors import UserError
from launcher.layout.box import Box, Shape
from launcher.mindspore.strategy import Strategy
from launcher.mindspore.tensor_layout import TensorLayout, boxes, full_shape
from launcher.weights.formats import rank_header_of
from launcher.weights.formats.safetensors import Header
from launcher.weights.pieces import Piece
from launcher.weights.ranks.distributed import NAMED
from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.source import HEADER_THREADS, rank_of
from launcher.weights.threads import in_parallel

ADVICE = "Give the strategy files of the run that wrote the rank files, of all pipeline stages"
COMPARED_BYTES = 4096
"""Bytes of a tensor that are compared between ranks."""


@dataclass(frozen=True)
class Run:
    """The files of one save, and the strategy of the run that wrote them."""

    path: Path
    stages: Sequence[Mapping[str, TensorLayout]]
    stage_ranks: int
    files: Mapping[int, Path]
    headers: Mapping[Path, Header]

    @property
    def world_size(self) -> int:
        """Ranks of all stages."""
        return self.stage_ranks * len(self.stages)

    @property
    def lost(self) -> list[int]:
        """Ranks without a file, at most `NAMED` + 1 of them."""
        absent = (rank for rank in range(self.world_size) if rank not in self.files)
        return list(itertools.islice(absent, NAMED + 1))

    @cached_property
    def names(self) -> frozenset[str]:
        """All tensors that some stage has a layout of."""
        return frozenset(itertools.chain(*self.stages))

    def place(self, name: str, rank: int, shape: Shape) -> tuple[Shape, Box] | None:
        """(global shape, box) of the slice of `shape` that `rank` holds of tensor `name`; None
        where its stage does not list it. Raises `UserError` for a slice that does not fit its
        layout."""
        stage, local_rank = divmod(rank, self.stage_ranks)
        layout = self.stages[stage].get(name)
        if layout is None:
            return None
        try:
            return _box(layout, shape, local_rank)
        except ValueError as error:
            raise UserError(
                f"`{name}` has shape {list(shape)} in {self.files[rank]}: {error}",
                where=str(self.path),
                rule="the strategy files must be of the run that wrote the rank files",
                advice=ADVICE,
            ) from error

    def first_bytes(self, piece: Piece) -> bytes:
        """The first bytes of a piece, at most `COMPARED_BYTES`."""
        header = self.headers[piece.file]
        start = np.empty(min(piece.entry.stop - piece.entry.start, COMPARED_BYTES), np.uint8)
        with Files() as files:
            descriptor = files.descriptor(piece.file, header.file_bytes, header.modified)
            read_exactly(descriptor, piece.file, start.data, piece.entry.start)
        return start.tobytes()


def open_run(path: Path, files: Sequence[Path], strategy: Strategy) -> Run:
    """The run that wrote `files`, one for each rank, in rank folders below `path`.

    Raises `UserError` when a file cannot be read, two are of one rank or one of a rank that the
    strategy does not have, and when stages are missing or of different size.
    """
    stages = strategy.by_stage()
    if not stages or list(stages) != list(range(len(stages))):
        raise UserError(
            f"the strategy files describe {_stages_text(stages)}",
            where=str(path),
            rule="the stages of a run are 0 to n - 1 without gaps",
            advice=ADVICE,
        )
    ranks = {layout.ranks for stage in stages.values() for layout in stage.values()}
    if len(ranks) > 1:
        raise UserError(
            f"the strategy files describe stages of {' and of '.join(map(str, sorted(ranks)))} "
            "ranks",
            where=str(path),
            rule="all stages of a run have the same number of ranks",
            advice=ADVICE,
        )
    by_rank = _by_rank(path, files, ranks.pop() * len(stages))
    headers = in_parallel(rank_header_of, by_rank.values(), HEADER_THREADS)
    return Run(
        path, list(stages.values()), next(iter(stages[0].values())).ranks, by_rank,
        dict(zip(by_rank.values(), headers, strict=True)),
    )  # fmt: skip


def _stages_text(stages: Collection[int]) -> str:
    return f"pipeline stage {', '.join(map(str, stages))}" if stages else "no pipeline stage"


def _by_rank(path: Path, files: Sequence[Path], world_size: int) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for file in files:
        rank = rank_of(file.parent)
        if rank is None or rank in found:
            raise UserError(
                f"{file} is not in a rank folder" if rank is None else
                f"{file} and {found[rank].name} are of one rank",
                rule="a save has one file for each rank, in rank_<number>/",
                advice="Move the files of the other run away",
            )  # fmt: skip
        found[rank] = file
    if not found:
        raise UserError(
            f"{path} holds no rank files", rule="*.safetensors or *.ckpt in rank_*/ is expected"
        )
    if max(found) >= world_size:
        raise UserError(
            f"{found[max(found)]} is of rank {max(found)}",
            where=str(path),
            rule=f"the strategy files describe {world_size} ranks, from 0 on",
            advice=ADVICE,
        )
    return dict(sorted(found.items()))


@lru_cache(maxsize=1 << 16)
def _box(layout: TensorLayout, shape: Shape, local_rank: int) -> tuple[Shape, Box]:
    """(global shape, box) of the slice of `shape` that a rank holds. Cached: the tensors of a rank
    have few layouts and shapes."""
    full = full_shape(layout, shape)
    return full, boxes(layout, full, local_rank)[0]
