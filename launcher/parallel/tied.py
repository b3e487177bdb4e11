"""Tied embeddings of a pipeline: the first stage has the embedding, the last the head.

Owns the two replicas of the tied weight. Invariant: they start equal and get the same gradient, the
sum of both, before the gradients are clipped or used; so they stay bitwise equal. Only the first
counts in norms and checkpoints.

    loop    first and last stage are on two ranks: an all-reduce over a group of these two
    V       both are on the same rank: two parameters there
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.layout.mesh import Mesh
from launcher.parallel.local import local, local_gradient
from models.stage import StageSplit


@dataclass(frozen=True)
class TiedReplicas:
    """The replicas on this rank: one, both (that of the first stage first), or none."""

    parameters: Sequence[nn.Parameter]
    group: dist.ProcessGroup | None
    """The ranks of the first and the last stage; None if one rank has both, or this rank none."""

    def all_reduce_gradients(self) -> None:
        """Set the gradient of every replica to the sum of both, in place; None counts as zeros."""
        gradients = [local_gradient(parameter) for parameter in self.parameters]
        if self.group is not None:
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.group)
        elif gradients:
            first, second = gradients
            first.add_(second)
            second.copy_(first)


def tied_replicas(
    mesh: Mesh, split: StageSplit, parameters: Sequence[nn.Parameter]
) -> TiedReplicas:
    """The replicas for a pipeline of these stages; `parameters` are those on this rank, in order.

    A collective: creates the groups of all pipelines, in the same order on every rank.
    """
    first, last = split.ranks[0], split.ranks[-1]
    if first == last:
        return TiedReplicas(parameters, None)
    own: dist.ProcessGroup | None = None
    for rank in range(mesh.world_size):
        at = mesh.coordinates(rank)
        if at["pp"] != first:
            continue
        pair = [rank, _with_pipeline_rank(mesh, rank, last)]
        group = dist.new_group(pair)
        if dist.get_rank() in pair:
            own = cast(dist.ProcessGroup, group)
    return TiedReplicas(parameters, own)


def broadcast_tied(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    """Copy the tensors of the first replica to the second: parameters, moments."""
    with torch.no_grad():
        for source, target in zip(first, second, strict=True):
            local(target).copy_(local(source))


def _with_pipeline_rank(mesh: Mesh, rank: int, pipeline_rank: int) -> int:
    """The rank that differs from `rank` in its pipeline coordinate only: the outermost one."""
    stride = mesh.world_size // mesh.pp
    return pipeline_rank * stride + rank % stride
