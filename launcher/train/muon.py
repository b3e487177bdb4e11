"""Muon: momentum whose matrices are orthogonalised before they are applied.

Keller Jordan: https://kellerjordan.github.io/posts/muon/, with the update scaled as in "Muon is
Scalable for LLM Training" (arXiv 2502.16982). The numbers are those of `torch.optim.Muon` with
`adjust_lr_fn="match_rms_adamw"`; beyond it, matrices may be stacked, and cut over ranks:

    momentum        element by element, on the rank that holds them
    orthogonalise   matrix by matrix, each on one rank (`launcher.parallel.matrices`)
    update          element by element again
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from launcher.parallel.local import local, local_gradient
from launcher.parallel.matrices import MatrixExchange
from launcher.train.moments import seed_of, store

EPS = 1e-7
DTYPE = torch.bfloat16
"""In which matrices travel and are orthogonalised, as in torch: the result is not exact anyway."""


class Muon(torch.optim.Optimizer):
    """Updates hidden matrices. `rms`: the root mean square that an update has, before the learning
    rate; 0.2 is about that of AdamW, so that learning rates for AdamW fit."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        exchange: MatrixExchange,
        *,
        momentum: float,
        nesterov: bool,
        steps: int,
        coefficients: Sequence[float],
        rms: float,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        """`state_dtype`: of the momentum, by default that of the parameters."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.dtype = state_dtype
        self.updates = 0
        """Updates so far."""
        self._exchange, self._rms = exchange, rms
        self._momentum, self._nesterov = momentum, nesterov
        self._orthogonalize = partial(orthogonalize, steps=steps, coefficients=coefficients)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every matrix. A missing gradient counts as zeros, so that all ranks take part."""
        self.updates += 1
        held: dict[str, tuple[nn.Parameter, float]] = {}
        directions: dict[str, Tensor] = {}
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                held[name] = parameter, group["lr"]
                directions[name] = self._direction(name, parameter)
                local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
        for part, update in self._exchange.apply(directions, self._orthogonalize):
            parameter, rate = held[part.name]
            scale = self._rms * math.sqrt(max(part.matrix_shape))
            target = local(parameter)[part.inside]
            target.add_(update.to(target.device), alpha=-rate * scale)

    def _direction(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The momentum of the local part of a parameter after this step's gradient, as it is to be
        orthogonalised."""
        state, gradient = self.state[parameter], local_gradient(parameter)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                parameter, dtype=self.dtype, requires_grad=False
            )
        buffer = local(state["momentum_buffer"])
        if self.dtype is None:
            buffer.lerp_(gradient, 1 - self._momentum)
        else:
            gradient = gradient.float()
            stored, buffer = buffer, buffer.float().lerp(gradient, 1 - self._momentum)
            store(stored.view(-1), buffer.reshape(-1), 0, seed_of(name, self.updates))
        direction = gradient.lerp(buffer, self._momentum) if self._nesterov else buffer
        return direction.to(DTYPE)


def orthogonalize(matrix: Tensor, *, steps: int, coefficients: Sequence[float]) -> Tensor:
    """U S' V^T for `matrix` = U S V^T, with all of S' near 1: a Newton-Schulz iteration.

    `matrix`: [rows, columns], of any floating dtype; so is the result.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
