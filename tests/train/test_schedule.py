"""Every curve at chosen steps, computed by hand from the formulas."""

from __future__ import annotations

import math

import pytest

from launcher.config.schema import LrScheduleSection
from launcher.config.schema.training import SCHEDULE_ARGUMENTS
from launcher.train.schedule import CURVES, build_schedule


def rates(kind: str, steps, total: int = 100, fallback: float | None = None, **arguments):
    section = LrScheduleSection(type=kind, **{"learning_rate": 1.0, **arguments})
    curve = build_schedule(section, fallback_rate=fallback, total_steps=total, steps_per_epoch=10)
    return [curve(step) for step in steps]


CASES = [
    ("ConstantWarmUpLR", {"warmup_steps": 4}, [0, 1, 4, 99], [0.0, 0.25, 1.0, 1.0]),
    ("ConstantWarmUpLR", {"warmup_steps": 4, "warmup_lr_init": 0.2}, [0, 2], [0.2, 0.6]),
    ("LinearWithWarmUpLR", {"warmup_steps": 20}, [10, 20, 60, 100, 200], [0.5, 1.0, 0.5, 0, 0]),
    ("CosineWithWarmUpLR", {}, [0, 50, 100, 150], [1.0, 0.5, 0.0, 0.0]),
    ("CosineWithWarmUpLR", {"lr_end": 0.1, "warmup_ratio": 0.2}, [10, 20, 60, 100],
     [0.5, 1.0, 0.55, 0.1]),
    ("CosineWithWarmUpLR", {"warmup_epochs": 2}, [10, 20], [0.5, 1.0]),
    ("CosineWithWarmUpLR", {"decay_steps": 50}, [25, 50, 80], [0.5, 0.0, 0.0]),
    ("CosineWithWarmUpLR", {"decay_ratio": 0.5}, [25, 50], [0.5, 0.0]),
    ("CosineWithRestartsAndWarmUpLR", {"num_cycles": 2.0}, [0, 25, 50, 75, 100],
     [1, 0.5, 1, 0.5, 0]),
    ("PolynomialWithWarmUpLR", {"lr_end": 0.0, "power": 2.0}, [0, 50, 100], [1.0, 0.25, 0.0]),
    ("PolynomialWithWarmUpLR", {}, [100], [1e-7]),
    ("CosineAnnealingLR", {"t_max": 10, "eta_min": 0.2}, [0, 5, 10, 20], [1.0, 0.6, 0.2, 1.0]),
    ("CosineAnnealingWarmRestarts", {"t_0": 10, "t_mult": 2}, [0, 5, 10, 20, 29, 30],
     [1, 0.5, 1, 0.5, 0.5 * (1 + math.cos(math.pi * 19 / 20)), 1]),
    ("CosineAnnealingWarmRestarts", {"t_0": 10}, [5, 10, 25], [0.5, 1.0, 0.5]),
    ("WarmUpStableDecayLR", {"warmup_steps": 10, "decay_start_ratio": 0.6, "lr_end": 0.0},
     [5, 10, 59, 80, 100], [0.5, 1.0, 1.0, 0.5, 0.0]),
    ("WarmUpStableDecayLR", {"decay_start_steps": 50, "lr_end": 0.0}, [50, 75], [1.0, 0.5]),
    ("ConstantWithCoolDownLR", {"warmup_steps": 10, "keep_steps": 20, "decay_steps": 40,
                                "lr_end1": 0.2, "final_steps": 10, "lr_end2": 0.1},
     [5, 29, 30, 50, 70, 79, 80], [0.5, 1.0, 1.0, 0.6, 0.2, 0.2, 0.1]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "steps", "expected"), CASES)
def test_curve(kind, arguments, steps, expected) -> None:
    assert rates(kind, steps, **arguments) == pytest.approx(expected, abs=1e-12)


def test_every_type_of_the_schema_has_a_curve() -> None:
    assert set(CURVES) == set(SCHEDULE_ARGUMENTS)
    assert {case[0] for case in CASES} == set(CURVES)


def test_the_rate_comes_from_the_schedule_else_the_optimizer_else_a_default() -> None:
    assert rates("ConstantWarmUpLR", [5], fallback=3.0) == [1.0]
    assert rates("ConstantWarmUpLR", [5], fallback=3.0, learning_rate=None) == [3.0]
    assert rates("ConstantWarmUpLR", [5], learning_rate=None) == [5e-5]


def test_a_schedule_may_be_longer_than_the_run() -> None:
    assert rates("LinearWithWarmUpLR", [100], total=100, total_steps=200) == [0.5]
    assert rates("LinearWithWarmUpLR", [50], total=100, total_steps=-1) == [0.5]
