"""Gradients after the backward pass: the remaining all-reduces, and the global gradient norm.

Owns the reductions of gradients that FSDP does not do in the backward pass. They work on local
shards, in few and large collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from launcher.parallel.grad_all_reduce import GradAllReduce
from launcher.parallel.local import local_gradient, local_gradients
from launcher.parallel.tied import TiedReplicas


def all_reduce_partial(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """All-reduce, in place, gradients of which each rank of `group` has a part: one collective.

    A missing gradient counts as zeros.
    """
    gradients = [gradient for p in parameters if (gradient := local_gradient(p)).numel()]
    if not gradients:
        return
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(total)


def squared_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The sum of the squares of the local gradients, a float32 scalar on `device`; the gradients
    may be on another one."""
    gradients = local_gradients(parameters)
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    return torch.stack(norms).square().sum().to(device)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The reductions of the gradients of one rank after its backward pass."""

    device: torch.device
    owned: Sequence[nn.Parameter]
    """Parameters that this rank counts in the norm: over all ranks each element counts once."""
    partial: Sequence[nn.Parameter] = ()
    """Parameters of which each rank of `partial_group` has only a part of the gradient."""
    partial_group: dist.ProcessGroup | None = None
    grad_all_reduce: GradAllReduce | None = None
    """All-reduces gradients over data-parallel ranks where FSDP does not."""
    embedding: Sequence[nn.Parameter] | None = None
    """Those of `owned` that belong to the embedding, if its norm is monitored; None: it is not."""
    tied: TiedReplicas | None = None
    """Replicas of a tied embedding on the first and the last stage of a pipeline."""

    def finish(self) -> None:
        """Complete the gradients of the global batch, in place."""
        if self.grad_all_reduce is not None:
            self.grad_all_reduce.finish()
        if self.partial_group is not None:
            all_reduce_partial(self.partial, self.partial_group)
        if self.tied is not None:
            self.tied.all_reduce_gradients()

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared global norm, a float32 scalar, to be all-reduced."""
        return squared_norm(self.owned, self.device)

    def squared_norm_of_embedding(self) -> Tensor | None:
        """As `squared_norm`, float32 [1], of the embedding alone; None if it is not monitored."""
        return None if self.embedding is None else squared_norm(self.embedding, self.device)[None]
