"""Tied embeddings of a pipeline: the first stage embeds, the last has the head, one tensor in both.

Owns the two copies. Invariant: they start equal and get the same gradient, the sum of both, before
the gradients are clipped or used; so they stay equal to the bit. Only the first counts where a
tensor is counted once: in norms, in checkpoints.

    loop    first and last stage on two ranks: they add up over a group of their own
    V       both on the same rank: two parameters there
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.layout.mesh import Mesh
from launcher.parallel.local import local, local_gradient
from models.stage import StageSplit


@dataclass(frozen=True)
class TiedCopies:
    """The copies that are on this rank: one, both (first stage first), or none in between."""

    parameters: Sequence[nn.Parameter]
    group: dist.ProcessGroup | None
    """The ranks of the first and the last stage; None where one rank has both, or this one none."""

    def add_up_gradients(self) -> None:
        """Give every copy the sum of both gradients, in place; one without a gradient gets one."""
        gradients = [local_gradient(parameter) for parameter in self.parameters]
        if self.group is not None:
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.group)
        elif gradients:
            first, second = gradients
            first.add_(second)
            second.copy_(first)


def tied_copies(mesh: Mesh, split: StageSplit, parameters: Sequence[nn.Parameter]) -> TiedCopies:
    """The copies for a pipeline of these stages; `parameters` are those on this rank, in order.

    Makes the groups of all pipelines, in the same order on every rank: all ranks must come here.
    """
    first, last = split.ranks[0], split.ranks[-1]
    if first == last:
        return TiedCopies(parameters, None)
    own = None
    for rank in range(mesh.world_size):
        at = mesh.coordinates(rank)
        if at["pp"] != first:
            continue
        pair = [rank, _with_pipeline_rank(mesh, rank, last)]
        group = dist.new_group(pair)
        if dist.get_rank() in pair:
            own = group
    return TiedCopies(parameters, own)


def broadcast_tied(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    """Give the tensors of the second copy the values of the first: parameters, moments."""
    with torch.no_grad():
        for source, target in zip(first, second, strict=True):
            local(target).copy_(local(source))


def _with_pipeline_rank(mesh: Mesh, rank: int, pipeline_rank: int) -> int:
    """The rank that differs from `rank` in its pipeline coordinate only: the outermost one."""
    stride = mesh.world_size // mesh.pp
    return pipeline_rank * stride + rank % stride
