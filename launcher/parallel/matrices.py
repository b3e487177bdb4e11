r"""Sharded matrices: each is gathered on one rank, and the result is scattered back.

    rank 0  rows 0-1 --\                        /--> rank 0  rows 0-1
                        owner: f(all the rows)
    rank 1  rows 2-3 --/                        \--> rank 1  rows 2-3

Owns which rank processes which matrix, and the communication. Both follow from the layout, so every
rank derives the same plan without communication. Work is spread over all ranks that hold a part of
a matrix, replicas included; between two ranks there is one message a round.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.layout.box import Box, Shape, full_box
from launcher.layout.layout import Layout
from launcher.layout.replicas import Ranks, writer_ranks
from launcher.weights.tensor_mapping import MappingsOf

ROUND_ELEMENTS = 64 << 20
"""Elements of the full matrices that one rank holds at a time; a larger matrix is alone."""


class HeldPart(NamedTuple):
    """What this rank holds of one matrix."""

    name: str
    """Of the tensor that contains the matrix."""
    inside: tuple[slice, ...]
    """Where it is in the local shard of that tensor."""
    matrix_shape: Shape
    """(rows, columns) of the full matrix."""


_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a tensor, the ranks that hold its parts, and the one that processes it."""

    name: str
    box: Box
    """In the global tensor; all dims but the last two have size 1."""
    parts: tuple[tuple[Box, Ranks], ...]
    """The parts it is sharded into, each with its ranks, ascending."""
    owner: int
    """The rank that gathers and processes it."""

    @property
    def shape(self) -> Shape:
        """Rows and columns."""
        return self.box.size[-2:]

    def sender(self, ranks: Ranks) -> int:
        """Which of `ranks`, replicas of one part, sends it to the owner: the owner itself, else the
        one with the owner's index among the replicas of its own part."""
        if self.owner in ranks:
            return self.owner
        index = next(held.index(self.owner) for _, held in self.parts if self.owner in held)
        return ranks[index % len(ranks)]


@dataclass(frozen=True)
class MatrixExchange:
    """The exchange of the matrices of some tensors, for one rank."""

    rank: int
    device: torch.device
    """Where matrices are gathered, and from where messages are sent."""
    boxes: Mapping[str, Box]
    """What this rank holds of each tensor."""
    rounds: Sequence[Sequence[Matrix]]

    def apply(
        self, held: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[HeldPart, Tensor]]:
        """Each local part of `function(matrix)`, for every matrix of the tensors `held`.

        `held`: the local shard of each tensor, all of one dtype. `function` keeps dtype and shape.
        A collective: called on all ranks.
        """
        for matrices in self.rounds:
            full = self._gather(matrices, held)
            results = {number: function(matrix) for number, matrix in full.items()}
            yield from self._scatter(matrices, results, next(iter(held.values())).dtype)

    def _gather(self, matrices: Sequence[Matrix], held: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The full matrices that this rank owns, by their index in the round."""
        sends, receives = defaultdict[int, list[Tensor]](list), defaultdict[int, list[Tensor]](list)
        full: dict[int, Tensor] = {}
        for number, matrix in enumerate(matrices):
            dtype = held[matrix.name].dtype
            if matrix.owner == self.rank:
                full[number] = torch.empty(matrix.shape, dtype=dtype, device=self.device)
            for box, ranks in matrix.parts:
                sender = matrix.sender(ranks)
                part = held[matrix.name][self._inside(matrix, box)] if sender == self.rank else None
                if matrix.owner == self.rank:
                    target = full[number][_slices(box.inside(matrix.box))[-2:]]
                    if part is None:
                        receives[sender].append(target)
                    else:
                        target.copy_(part.view(target.shape))
                elif part is not None:
                    sends[matrix.owner].append(part.to(self.device))
        _exchange(sends, receives)
        return full

    def _scatter(
        self, matrices: Sequence[Matrix], results: Mapping[int, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[HeldPart, Tensor]]:
        sends, receives = defaultdict[int, list[Tensor]](list), defaultdict[int, list[Tensor]](list)
        mine: list[tuple[HeldPart, Tensor]] = []
        for number, matrix in enumerate(matrices):
            for box, ranks in matrix.parts:
                part = _NOTHING
                if matrix.owner == self.rank:
                    part = results[number][_slices(box.inside(matrix.box))[-2:]].reshape(box.size)
                    for rank in ranks:
                        if rank != self.rank:
                            sends[rank].append(part)
                elif self.rank in ranks:
                    part = torch.empty(box.size, dtype=dtype, device=self.device)
                    receives[matrix.owner].append(part)
                if self.rank in ranks:
                    held = HeldPart(matrix.name, self._inside(matrix, box), matrix.shape)
                    mine.append((held, part))
        _exchange(sends, receives)
        yield from mine

    def _inside(self, matrix: Matrix, box: Box) -> tuple[slice, ...]:
        """Where `box` is in the local shard."""
        return _slices(box.inside(self.boxes[matrix.name]))


def matrix_exchange(
    names: Sequence[str], layout: Layout, mappings_of: MappingsOf, rank: int, device: torch.device
) -> MatrixExchange:
    """The exchange of the matrices in the tensors `names`, which `rank` holds parts of.

    A tensor in files is one matrix, or a stack of them.
    """
    placements, replicas = layout.of(rank), _Replicas(layout)
    found: dict[str, Matrix] = {}
    for name in names:
        mine = placements[name].boxes[0]
        for number, box in enumerate(_matrices(name, layout.shapes[name], mappings_of)):
            if mine.intersect(box) is not None:
                found[f"{name}#{number}"] = Matrix(name, box, replicas.parts(name, box), -1)
    sets = {key: _ranks_of(matrix.parts) for key, matrix in found.items()}
    costs = {key: math.prod(m.shape) * min(m.shape) for key, m in found.items()}
    owners = writer_ranks(costs, sets)
    by_set: dict[Ranks, list[Matrix]] = {}
    for key in sorted(found):
        owned = found[key]
        matrix = Matrix(owned.name, owned.box, owned.parts, owners[key])
        by_set.setdefault(sets[key], []).append(matrix)
    rounds = [chunk for ranks in sorted(by_set) for chunk in _rounds(by_set[ranks])]
    return MatrixExchange(rank, device, {name: placements[name].boxes[0] for name in names}, rounds)


def _matrices(name: str, shape: Shape, mappings_of: MappingsOf) -> Iterator[Box]:
    """The boxes of the matrices in a tensor of the model."""
    mappings = mappings_of(name, shape)
    for box in [full_box(shape)] if mappings is None else [mapping.box for mapping in mappings]:
        rows_and_columns = math.prod(box.size[-2:])
        yield from box.portions(rows_and_columns)


class _Replicas:
    """Which ranks hold which box of a tensor; cached for tensors that are sharded alike."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._boxes: dict[object, dict[Box, Ranks]] = {}
        self._parts: dict[object, tuple[tuple[Box, Ranks], ...]] = {}

    def parts(self, name: str, matrix: Box) -> tuple[tuple[Box, Ranks], ...]:
        """The parts of `matrix`, a box of tensor `name`."""
        key = (self._layout.shapes[name], self._layout.spec_of(name))
        if key not in self._boxes:
            self._boxes[key] = self._ranks_by_box(name)
        if (key, matrix) not in self._parts:
            self._parts[key, matrix] = tuple(
                (common, ranks) for box, ranks in self._boxes[key].items()
                if (common := box.intersect(matrix)) is not None
            )  # fmt: skip
        return self._parts[key, matrix]

    def _ranks_by_box(self, name: str) -> dict[Box, Ranks]:
        found: dict[Box, list[int]] = {}
        for rank in range(self._layout.mesh.world_size):
            placement = self._layout.of(rank).get(name)
            if placement is not None and placement.boxes[0].numel:
                found.setdefault(placement.boxes[0], []).append(rank)
        return {box: tuple(ranks) for box, ranks in found.items()}


def _ranks_of(parts: Sequence[tuple[Box, Ranks]]) -> Ranks:
    return tuple(sorted({rank for _, ranks in parts for rank in ranks}))


def _rounds(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Matrices on the same ranks, in rounds that limit what one owner holds at once."""
    taken: list[Matrix] = []
    loads = defaultdict[int, int](int)
    for matrix in matrices:
        size = math.prod(matrix.shape)
        if loads[matrix.owner] and loads[matrix.owner] + size > ROUND_ELEMENTS:
            yield taken
            taken, loads = [], defaultdict(int)
        taken.append(matrix)
        loads[matrix.owner] += size
    if taken:
        yield taken


def _exchange(
    sends: Mapping[int, Sequence[Tensor]], receives: Mapping[int, Sequence[Tensor]]
) -> None:
    """Send tensors to ranks, and receive into the tensors of `receives`."""
    outgoing = {rank: torch.cat([t.reshape(-1) for t in parts]) for rank, parts in sends.items()}
    incoming = {
        rank: parts[0].new_empty(sum(part.numel() for part in parts))
        for rank, parts in receives.items()
    }
    operations = [dist.P2POp(dist.isend, buffer, rank) for rank, buffer in outgoing.items()]
    operations += [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in incoming.items()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for rank, parts in receives.items():
        chunks = incoming[rank].split([part.numel() for part in parts])
        for part, chunk in zip(parts, chunks, strict=True):
            part.copy_(chunk.view(part.shape))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
