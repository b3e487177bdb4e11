"""Learning-rate schedules: pure functions of the step, so there is no state to save.

Owns the curves. Types, arguments and formulas are those of MindFormers' `mindformers.core.lr`; step
0 is the first optimizer step, whose rate with warm-up is `warmup_lr_init`.

    CosineWithWarmUpLR      ConstantWithCoolDownLR      WarmUpStableDecayLR
       /--\\                    /-----\\                    /--------\\
      /     \\___              /        \\____               /          \\
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from launcher.config.schema import LrScheduleSection

Curve = Callable[[int], float]
DEFAULT_RATE = 5e-5


@dataclass(frozen=True)
class Shape:
    """The numbers of a curve, defaults filled in: rates, and lengths in steps."""

    base: float
    """The highest rate."""
    end: float
    """The rate after the decay."""
    warmup: int
    warmup_start: float
    total: int
    """Length of the curve."""
    decay: int
    """Length of the decay after the warm-up."""

    def progress(self, step: int) -> float:
        """The fraction of the decay that is done, 0 to 1."""
        return min(max((step - self.warmup) / max(self.decay, 1), 0.0), 1.0)

    def between(self, weight: float) -> float:
        """The rate `weight` of the way up from the end to the base."""
        return self.end + (self.base - self.end) * weight


def build_schedule(
    section: LrScheduleSection,
    *,
    fallback_rate: float | None,
    total_steps: int,
    steps_per_epoch: int,
    scale: float = 1.0,
) -> Curve:
    """The learning rate of optimizer step i (from 0).

    `fallback_rate` (optimizer.learning_rate) is used when the section has none; `total_steps` is
    the length of the run, for curves without one; `scale` multiplies the base rate.
    """
    base = section.learning_rate or fallback_rate or DEFAULT_RATE
    total = section.total_steps if (section.total_steps or -1) > 0 else total_steps
    assert total is not None
    warmup = warmup_steps(section, total, steps_per_epoch)
    decay = section.decay_steps or total - warmup
    if section.decay_ratio is not None:
        decay = int(section.decay_ratio * total)
    lowest = 1e-7 if section.type in ("PolynomialWithWarmUpLR", "WarmUpStableDecayLR") else 0.0
    shape = Shape(
        base=base * scale,
        end=lowest if section.lr_end is None else section.lr_end,
        warmup=warmup,
        warmup_start=section.warmup_lr_init,
        total=total,
        decay=decay,
    )
    return partial(CURVES[section.type], shape, section)


def warmup_steps(section: LrScheduleSection, total: int, steps_per_epoch: int) -> int:
    """Steps of the linear warm-up of a curve of `total` steps."""
    if section.warmup_ratio is not None:
        return int(section.warmup_ratio * total)
    if section.warmup_epochs is not None:
        return int(section.warmup_epochs * steps_per_epoch)
    return section.warmup_steps or 0


def _warmed(after: Callable[[Shape, LrScheduleSection, int], float]) -> Callable[..., float]:
    """A linear warm-up, then the curve `after`."""

    def curve(shape: Shape, section: LrScheduleSection, step: int) -> float:
        if step < shape.warmup:
            climb = (shape.base - shape.warmup_start) * step / shape.warmup
            return shape.warmup_start + climb
        return after(shape, section, step)

    return curve


def _constant(shape: Shape, section: LrScheduleSection, step: int) -> float:
    return shape.base


def _linear(shape: Shape, section: LrScheduleSection, step: int) -> float:
    return shape.between(1.0 - shape.progress(step))


def _cosine(shape: Shape, section: LrScheduleSection, step: int) -> float:
    cycles = 0.5 if section.num_cycles is None else section.num_cycles
    progress = shape.progress(step)
    return shape.between(max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))))


def _cosine_restarts(shape: Shape, section: LrScheduleSection, step: int) -> float:
    cycles = 1.0 if section.num_cycles is None else section.num_cycles
    progress = shape.progress(step)
    if progress >= 1.0:
        return shape.end
    return shape.between(max(0.0, 0.5 * (1.0 + math.cos(math.pi * (cycles * progress % 1.0)))))


def _polynomial(shape: Shape, section: LrScheduleSection, step: int) -> float:
    power = 1.0 if section.power is None else section.power
    return shape.between((1.0 - shape.progress(step)) ** power)


def _annealing(shape: Shape, section: LrScheduleSection, step: int) -> float:
    period = section.t_max or shape.total
    return _wave(shape.base, section.eta_min or 0.0, step / period)


def _annealing_restarts(shape: Shape, section: LrScheduleSection, step: int) -> float:
    period, growth = section.t_0 or shape.total, section.t_mult or 1
    while step >= period:
        step -= period
        if growth == 1:
            step %= period
        period *= growth
    return _wave(shape.base, section.eta_min or 0.0, step / period)


def _wave(high: float, low: float, half_waves: float) -> float:
    return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * half_waves))


def _stable_decay(shape: Shape, section: LrScheduleSection, step: int) -> float:
    start = section.decay_start_steps
    if section.decay_start_ratio is not None or start is None:
        ratio = 0.9 if section.decay_start_ratio is None else section.decay_start_ratio
        start = int(ratio * shape.total)
    over = min(max((step - start) / max(shape.total - start, 1), 0.0), 1.0)
    return shape.between(1.0 - over)


def _cool_down(shape: Shape, section: LrScheduleSection, step: int) -> float:
    keep, first_end = section.keep_steps or 0, section.lr_end1 or 0.0
    step -= shape.warmup + keep
    if step < 0:
        return shape.base
    decay = shape.decay
    if section.decay_steps is None and section.decay_ratio is None:
        decay = max(shape.total - shape.warmup - keep - (section.final_steps or 0), 1)
    if step < decay:
        cycles = 0.5 if section.num_cycles is None else section.num_cycles
        return _wave(shape.base, first_end, step / decay * cycles * 2.0)
    if step < decay + (section.final_steps or 0) or section.lr_end2 is None:
        return first_end
    return section.lr_end2


CURVES: dict[str, Callable[[Shape, LrScheduleSection, int], float]] = {
    "ConstantWarmUpLR": _warmed(_constant),
    "LinearWithWarmUpLR": _warmed(_linear),
    "CosineWithWarmUpLR": _warmed(_cosine),
    "CosineWithRestartsAndWarmUpLR": _warmed(_cosine_restarts),
    "PolynomialWithWarmUpLR": _warmed(_polynomial),
    "CosineAnnealingLR": _annealing,
    "CosineAnnealingWarmRestarts": _annealing_restarts,
    "WarmUpStableDecayLR": _warmed(_stable_decay),
    "ConstantWithCoolDownLR": _warmed(_cool_down),
}
"""`lr_schedule.type` to its curve."""
