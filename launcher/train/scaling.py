"""The loss scale, which keeps small float16 gradients from being rounded to nothing.

Owns when a step counts as overflowed and what the scale is after it. Invariant: both follow from
the gradient norm, which is the same number on every rank, so all ranks decide alike without a
collective of their own.
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
"""A dynamic scale goes no lower: a gradient that is not finite without a scale is no overflow."""


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the scale moves. The scale itself, and the steps since it moved, are in `TrainState`."""

    first: float
    """The scale of the first step; of every step when it is fixed."""
    factor: float | None = None
    """What a dynamic scale is divided by after an overflow and multiplied by after `window` good
    steps; None: the scale is fixed."""
    window: int = 0

    @property
    def kind(self) -> str:
        """`dynamic` or `fixed`, as state files say it."""
        return "fixed" if self.factor is None else "dynamic"

    def overflowed(self, norm: torch.Tensor) -> bool:
        """Whether a step with this gradient norm is to be skipped. The host waits for `norm`."""
        return not math.isfinite(norm.item())

    def move(self, state: TrainState, overflow: bool) -> None:
        """Set the scale for the step after one that did, or did not, overflow."""
        if self.factor is None:
            return
        state.good_steps = 0 if overflow else state.good_steps + 1
        if overflow:
            state.loss_scale = max(state.loss_scale / self.factor, SMALLEST_SCALE)
        elif state.good_steps >= self.window:
            state.loss_scale = min(state.loss_scale * self.factor, LARGEST_LOSS_SCALE)
            state.good_steps = 0

    def is_expected(self, scale: float, overflow: bool) -> bool:
        """Whether a step at `scale` only looks for the scale that fits: a lower one is next."""
        return overflow and self.factor is not None and scale > SMALLEST_SCALE


def loss_scaling(
    written: float | Mapping[str, Any] | None, compute_dtype: torch.dtype
) -> LossScaling | None:
    """What a checked `runner_wrapper.scale_sense` asks for; None: the loss is not scaled.

    Nothing written is a dynamic scale for float16 and none for dtypes with the range of float32.
    """
    if written is None:
        if compute_dtype != torch.float16:
            return None
        written = {"type": DYNAMIC_LOSS_SCALE}
    if not isinstance(written, Mapping):
        return LossScaling(first=float(written))
    numbers = {**LOSS_SCALES[written["type"]], **written}
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
