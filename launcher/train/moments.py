"""Optimizers whose moments have a dtype of their own, as bfloat16 beside float32 weights.

torch's fused AdamW wants the moments in the dtype of the weights. Here the arithmetic is float32
whatever the dtypes are, and what is stored is rounded stochastically: bfloat16 has 8 bits, so that
rounding to nearest would leave a moment as it is wherever a step changes it by less than 1/512 of
its value, which is every step of a second moment with beta2 = 0.999. Stochastic rounding is right
in the mean.

Invariants: the update of a step uses the moments before they are rounded; the random bits are a
hash of (name of the parameter, number of updates, index in the local shard), no generator is used,
so a run that is resumed on the same layout continues bit by bit, and replicas stay equal.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from launcher.parallel.local import local
from models.dropout import mix

CHUNK = 1 << 24
"""Elements that are updated together: bounds the memory of what is computed in between."""
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class StoredMoments(torch.optim.Optimizer):
    """An optimizer that rounds its state with `rounded`."""

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.dtype = dtype
        self.updates = 0
        """Updates so far."""

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The local shard of a state of `parameter`; zeros at first."""
        state = self.state[parameter]
        if state.get(key) is None:
            state[key] = torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False)
        return local(state[key])

    def named_groups(self) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
        """Every parameter, with its group and name."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield group, name, parameter


class Adam(StoredMoments):
    """Adam (https://arxiv.org/abs/1412.6980), `decoupled` with the weight decay of AdamW
    (https://arxiv.org/abs/1711.05101)."""

    def __init__(
        self, groups: list[dict[str, Any]], dtype: torch.dtype, *, betas: tuple[float, float],
        eps: float, decoupled: bool, compiled: Compile | None = None,
    ) -> None:  # fmt: skip
        """`compiled` makes one kernel of the update of a chunk."""
        super().__init__(groups, dtype)
        self._betas = betas
        update: Callable[..., Any] = partial(_adam, betas=betas, eps=eps, decoupled=decoupled)
        self._update = update if compiled is None else compiled(update)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        self.updates += 1
        corrections = [1 - beta**self.updates for beta in self._betas]
        numbers: dict[tuple[torch.device, float], Tensor] = {}
        for group, name, parameter in self.named_groups():
            if parameter.grad is None:
                continue
            held, gradient = local(parameter).detach(), local(parameter.grad)
            key = (held.device, group["weight_decay"])
            if key not in numbers:
                values = torch.tensor([group["lr"], group["weight_decay"], *corrections])
                numbers[key] = values.to(held.device, non_blocking=True)
            moments = (self.moment(parameter, "exp_avg"), self.moment(parameter, "exp_avg_sq"))
            seed = torch.tensor(seed_of(name, self.updates)).to(held.device, non_blocking=True)
            for start, pieces in _pieces(held, gradient, *moments):
                index = torch.arange(start, start + len(pieces[0]), device=held.device)
                self._update(*pieces, numbers[key], index, seed)


class SGD(StoredMoments):
    """Stochastic gradient descent with momentum, as torch computes it."""

    def __init__(
        self, groups: list[dict[str, Any]], dtype: torch.dtype, *, momentum: float,
        dampening: float, nesterov: bool,
    ) -> None:  # fmt: skip
        super().__init__(groups, dtype)
        self._momentum, self._dampening, self._nesterov = momentum, dampening, nesterov

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        self.updates += 1
        for group, name, parameter in self.named_groups():
            if parameter.grad is None:
                continue
            is_first = self.state[parameter].get("momentum_buffer") is None
            held, gradient = local(parameter).detach(), local(parameter.grad)
            buffer = self.moment(parameter, "momentum_buffer")
            share = 1.0 if is_first else 1 - self._dampening  # as torch, whose first is a copy
            for start, (weight, part, moment) in _pieces(held, gradient, buffer):
                wide = weight.float()
                slope = part.float() + group["weight_decay"] * wide
                velocity = moment.float() * self._momentum + slope * share
                direction = slope + self._momentum * velocity if self._nesterov else velocity
                weight.copy_(wide - group["lr"] * direction)
                store(moment, velocity, start, seed_of(name, self.updates))


def store(moment: Tensor, values: Tensor, start: int, seed: int | Tensor) -> None:
    """Write `values` float32 [n] to `moment` [n], rounded; `start`: index of the first in its
    shard."""
    if moment.dtype == torch.float32:
        moment.copy_(values)
        return
    index = torch.arange(start, start + len(values), device=values.device)
    moment.copy_(rounded(values, moment.dtype, random_bits(index, seed)))


def seed_of(name: str, updates: int) -> int:
    """The seed of a parameter in an update: 32 bits."""
    return (zlib.crc32(name.encode()) + updates * 0x9E3779B1) & 0xFFFFFFFF


def random_bits(index: Tensor, seed: int | Tensor) -> Tensor:
    """32 random bits for every index, int64, as a hash of both."""
    return mix(mix(index & 0xFFFFFFFF) ^ seed)


def rounded(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 `values` in `dtype`, float32 or bfloat16: up or down to a neighbour, with the
    probability that keeps the mean, by the 16 low bits of `bits`.

    bfloat16 is the upper half of float32: a number below 2**16, added to the bits of the value,
    carries into that half as often as the lower half is large.
    """
    if dtype == torch.float32:
        return values
    raw = values.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    # Not added to what is not finite: the bits of a NaN would become those of a number.
    kept = torch.where(values.isfinite(), (raw & -0x10000).view(torch.float32), values)
    return kept.to(dtype)


def _adam(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor,
    index: Tensor, seed: Tensor, *, betas: tuple[float, float], eps: float, decoupled: bool,
) -> None:  # fmt: skip
    """One update in place of tensors [n]; `numbers`: learning rate, weight decay, and the bias
    corrections of both moments."""
    rate, decay, of_first, of_second = numbers.unbind()
    wide, slope = weight.float(), gradient.float()
    if decoupled:
        wide = wide * (1 - rate * decay)
    else:
        slope = slope + decay * wide
    mean = torch.lerp(first.float(), slope, 1 - betas[0])
    square = second.float() * betas[1] + slope * slope * (1 - betas[1])
    size = (square / of_second).sqrt() + eps
    weight.copy_(wide - rate / of_first * mean / size)
    bits = random_bits(index, seed)
    first.copy_(rounded(mean, first.dtype, bits))
    second.copy_(rounded(square, second.dtype, bits >> 16))


def _pieces(*tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Flat pieces of contiguous tensors of one shape, as views, each with its start. (A gradient
    may have other strides, and is copied.)"""
    weight, gradient, *moments = tensors
    flat = [weight.view(-1), gradient.reshape(-1), *(moment.view(-1) for moment in moments)]
    for start in range(0, len(flat[0]), CHUNK):
        yield start, [tensor[start : start + CHUNK] for tensor in flat]
