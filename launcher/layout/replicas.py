"""Replicas: which ranks hold the same box of a tensor, and which of them reads or writes it.

Owns the arithmetic behind saving and reading each box once. Pure: every rank computes the same
result for its own tensors, without communication.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Replicas:
    """The replicas of a layout."""

    layout: Layout
    _known: dict[tuple[object, ...], Ranks] = field(default_factory=dict, repr=False)

    def of(self, name: str, rank: int) -> Ranks:
        """The ranks, ascending, that hold the same box of `name` as `rank`."""
        mesh, spec = self.layout.mesh, self.layout.spec_of(name)
        at = mesh.coordinates(rank)
        shared = spec.sharded and bool(self.layout.shapes[name])
        stages = tuple(range(mesh.pp)) if spec.stages is None else spec.stages
        tp = None if spec.tp_dim is None else at["tp"]
        ep = at["ep"] if spec.expert else None
        shard = at["expert_shard" if spec.expert else "dp_shard"] if shared else None
        key = (stages, tp, spec.expert, ep, shard)
        if key not in self._known:
            self._known[key] = _ranks(mesh, *key)
        return self._known[key]


def _ranks(
    mesh: Mesh, stages: Ranks, tp: int | None, expert: bool, ep: int | None, shard: int | None
) -> Ranks:
    """Ranks with these coordinates; None: any."""
    data = [
        index for index in range(mesh.data_parallel)
        if shard is None or _shard_of(mesh, index, expert) == shard
        if ep is None or index % mesh.ep == ep
    ]  # fmt: skip
    tps = range(mesh.tp) if tp is None else (tp,)
    return tuple(sorted(
        ((stage * mesh.data_parallel + index) * mesh.cp + cp) * mesh.tp + at
        for stage, index, cp, at in itertools.product(stages, data, range(mesh.cp), tps)
    ))  # fmt: skip


def _shard_of(mesh: Mesh, data_index: int, expert: bool) -> int:
    return data_index // mesh.ep % mesh.expert_shard if expert else data_index % mesh.dp_shard


def writer_ranks(sizes: Mapping[str, int], replica_ranks: Mapping[str, Ranks]) -> dict[str, int]:
    """Tensor to the one of its replica ranks that reads or writes it; bytes are balanced.

    `sizes`: bytes of the box of each tensor on this rank. `replica_ranks`: the ranks that hold the
    same box. All ranks of a set of replicas find the same result: tensors are assigned largest
    first, each to the rank with the fewest bytes so far.
    """
    sets: dict[Ranks, list[str]] = {}
    for name in sizes:
        sets.setdefault(replica_ranks[name], []).append(name)
    writer = {}
    for ranks, names in sets.items():
        loads = [(0, rank) for rank in ranks]
        for name in sorted(names, key=lambda name: (-sizes[name], name)):
            load, rank = heapq.heappop(loads)
            writer[name] = rank
            heapq.heappush(loads, (load + sizes[name], rank))
    return writer
