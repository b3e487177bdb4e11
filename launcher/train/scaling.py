"""The loss scale, which keeps small float16 gradients from underflowing.

Owns when a step has overflowed and how the scale moves. Invariant: both follow from the gradient
norm, which is the same on every rank, so that all ranks decide alike without a collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.config.schema import DYNAMIC_LOSS_SCALE, LARGEST_LOSS_SCALE, LOSS_SCALES
from launcher.parallel.local import local_gradients
from launcher.train.state import TrainState

SMALLEST_SCALE = 1.0
"""A dynamic scale goes no lower: a gradient that is not finite at 1 has not overflowed by it."""


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the scale moves. The scale itself, and the steps since it moved, are in `TrainState`."""

    first: float
    """The scale of the first step; of every step when it is fixed."""
    factor: float | None = None
    """A dynamic scale is divided by this after an overflow, and multiplied by it after `window`
    steps without; None: the scale is fixed."""
    window: int = 0

    @property
    def kind(self) -> str:
        """`dynamic` or `fixed`, for state files."""
        return "fixed" if self.factor is None else "dynamic"

    def overflowed(self, norm: float) -> bool:
        """Whether a step with this gradient norm is skipped."""
        return not math.isfinite(norm)

    def move(self, state: TrainState, overflow: bool) -> None:
        """Set the scale of the next step."""
        if self.factor is None:
            return
        state.good_steps = 0 if overflow else state.good_steps + 1
        if overflow:
            state.loss_scale = max(state.loss_scale / self.factor, SMALLEST_SCALE)
        elif state.good_steps >= self.window:
            state.loss_scale = min(state.loss_scale * self.factor, LARGEST_LOSS_SCALE)
            state.good_steps = 0

    def is_expected(self, scale: float, overflow: bool) -> bool:
        """Whether such a step only searches for the right scale: the next one has a lower scale."""
        return overflow and self.factor is not None and scale > SMALLEST_SCALE


def loss_scaling(
    written: float | Mapping[str, Any] | None, compute_dtype: torch.dtype
) -> LossScaling | None:
    """The scaling of a checked `runner_wrapper.scale_sense`; None: the loss is not scaled.

    By default float16 has a dynamic scale, and dtypes with the range of float32 have none.
    """
    if written is None:
        if compute_dtype != torch.float16:
            return None
        written = {"type": DYNAMIC_LOSS_SCALE}
    if not isinstance(written, Mapping):
        return LossScaling(first=float(written))
    numbers: dict[str, Any] = {**LOSS_SCALES[written["type"]], **written}
    first = float(numbers["loss_scale_value"])
    if written["type"] != DYNAMIC_LOSS_SCALE:
        return LossScaling(first=first)
    return LossScaling(
        first=first, factor=float(numbers["scale_factor"]), window=int(numbers["scale_window"])
    )


def unscale_gradients(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Divide all gradients by `scale`, in place; exact for a power of two."""
    gradients = local_gradients(parameters)
    if gradients:
        torch._foreach_mul_(gradients, 1.0 / scale)
