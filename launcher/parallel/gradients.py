"""Gradients after the backward pass: what is still to be added up, and how long they are all.

Owns what one step does to gradients over ranks, beside what FSDP does in the backward pass. All of
it works on local shards, in few and large collectives.
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
from launcher.parallel.tied import TiedCopies


def add_up_partial(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add up, in place, gradients of which each rank of `group` has only a part: one collective.

    A rank may have no part at all: it brings zeros.
    """
    gradients = [gradient for p in parameters if (gradient := local_gradient(p)).numel()]
    if not gradients:
        return
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(total)


def squared_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The sum of the squares of the local gradients, a float32 scalar on `device`, wherever the
    gradients are."""
    gradients = local_gradients(parameters)
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    return torch.stack(norms).square().sum().to(device)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What is still to be done with the gradients of one rank after its backward pass."""

    device: torch.device
    owned: Sequence[nn.Parameter]
    """Parameters whose elements this rank counts: over all ranks each element is counted once."""
    partial: Sequence[nn.Parameter] = ()
    """Parameters of which each rank of `partial_group` has only a part of the gradient."""
    partial_group: dist.ProcessGroup | None = None
    grad_all_reduce: GradAllReduce | None = None
    """Gradients that the ranks of a data group add up, where FSDP does not do it."""
    embedding: Sequence[nn.Parameter] | None = None
    """Those of `owned` that are the embedding's, where its norm is watched; None: it is not."""
    tied: TiedCopies | None = None
    """Copies of a tied embedding on the first and the last stage of a pipeline."""

    def finish(self) -> None:
        """Make the gradients those of the global batch, in place."""
        if self.grad_all_reduce is not None:
            self.grad_all_reduce.finish()
        if self.partial_group is not None:
            add_up_partial(self.partial, self.partial_group)
        if self.tied is not None:
            self.tied.add_up_gradients()

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared global norm, a float32 scalar: ranks add theirs up."""
        return squared_norm(self.owned, self.device)

    def squared_norm_of_embedding(self) -> Tensor | None:
        """As `squared_norm`, float32 [1], of the embedding alone; None where it is not watched."""
        return None if self.embedding is None else squared_norm(self.embedding, self.device)[None]
