"""The local shards of parameters and of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, or a plain tensor itself. Differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The local shards of the gradients, without missing and empty ones."""
    found = [local(p.grad).detach() for p in parameters if p.grad is not None]
    return [gradient for gradient in found if gradient.numel()]


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """The local shard of the gradient, which is set to zeros if it is None."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad).detach()
