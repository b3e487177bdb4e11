"""The parts of tensors that are here: of parameters, and of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`: the local shard of a DTensor, or the tensor itself. The
    backward pass goes through it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The local shards of the gradients that are there and not empty."""
    found = [local(p.grad).detach() for p in parameters if p.grad is not None]
    return [gradient for gradient in found if gradient.numel()]


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """The local shard of the gradient, which is made of zeros when there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad).detach()
