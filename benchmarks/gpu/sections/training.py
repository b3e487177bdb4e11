"""Steps of training: tokens a second, utilisation and memory, beside those of peers.

MFU is counted alike for all: the operations of `models.flops` over those the device could do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import peers
from benchmarks.gpu.driver import Bench, Case, Figures
from benchmarks.gpu.runs import do_steps, training_run
from benchmarks.gpu.sizes import Training
from launcher.report.device_peaks import peak_of
from launcher.train.meter import StepMeter
from models.build import build_model
from models.families import model_spec
from models.flops import training_flops

BFLOAT16: dict[str, Any] = {"model": {"model_config": {"compute_dtype": "bfloat16"}}}
ALL_BFLOAT16: dict[str, Any] = {
    "model": {"model_config": {"compute_dtype": "bfloat16", "params_dtype": "bfloat16"}},
    "recompute_config": {"recompute": True},
}
"""Weights, gradients and moments of 8B in bfloat16, for one device."""


def train_1b(bench: Bench) -> Iterator[Case]:
    """1B, float32 weights computing in bfloat16."""
    size = bench.sizes.train_1b
    for name, packed, keys in (
        ("rows, eager", False, {"compile": False}),
        ("packed, eager", True, {"compile": False}),
        ("rows, compiled", False, {"compile": bench.sizes.compiler}),
        ("packed, compiled", True, {"compile": bench.sizes.compiler}),
        ("packed, default", True, {}),
        ("packed, default, not deterministic", True, {"deterministic": False}),
    ):
        yield Case(name, _ours(bench, size, packed=packed, keys=BFLOAT16 | keys))
    yield Case("plain loop, rows, compiled", _plain(bench, size, torch.float32, compiled=True))
    yield Case("torchtitan, rows, compiled", _titan(bench, size))


def train_8b(bench: Bench) -> Iterator[Case]:
    """8B, all in bfloat16."""
    size = bench.sizes.train_8b
    for name, packed in (("packed, default", True), ("rows, default", False)):
        yield Case(name, _ours(bench, size, packed=packed, keys=ALL_BFLOAT16))
    yield Case("plain loop, rows, compiled", _plain(bench, size, torch.bfloat16, compiled=True))


def experts(bench: Bench) -> Iterator[Case]:
    """Six layers of a mixture of experts."""
    yield Case("packed, default", _ours(bench, bench.sizes.experts, packed=True, keys=BFLOAT16))


def _ours(
    bench: Bench, size: Training, *, packed: bool, keys: dict[str, Any]
) -> Callable[[], Figures]:
    def measure() -> Figures:
        with training_run(bench, size, packed=packed, keys=keys) as run:
            warmed = bench.now()
            do_steps(run, bench.sizes.warm_up)
            started = bench.now()
            run.meter.take_memory()
            tokens, loss = do_steps(run, bench.sizes.steps)
            seconds = bench.now() - started
            return {
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds / bench.sizes.steps,
                "mfu": run.meter.mfu(tokens / seconds),
                "peak_memory_gib": run.meter.take_memory().peak / 2**30,
                "warm_up_seconds": started - warmed,
                "loss": loss,
            }

    return measure


def _plain(
    bench: Bench, size: Training, dtype: torch.dtype, *, compiled: bool
) -> Callable[[], Figures]:
    return lambda: _measured(
        bench, size,
        peers.plain_loop(bench, size, dtype=dtype, compiled=compiled and bench.on_cuda),
    )  # fmt: skip


def _titan(bench: Bench, size: Training) -> Callable[[], Figures]:
    def measure() -> Figures:
        try:
            step = peers.torchtitan_loop(bench, size)
        except ImportError as error:
            return {"skipped": f"torchtitan: {error}"}
        return _measured(bench, size, step)

    return measure


def _measured(bench: Bench, size: Training, step: peers.Step) -> Figures:
    meter = meter_of(bench, size)
    warmed = bench.now()
    loss = torch.zeros(())
    for _ in range(bench.sizes.warm_up):
        step()
    started = bench.now()
    meter.take_memory()
    for _ in range(bench.sizes.steps):
        loss = step()
    seconds = bench.now() - started
    speed = size.rows * size.length * bench.sizes.steps / seconds
    return {
        "tokens_per_second": speed,
        "step_seconds": seconds / bench.sizes.steps,
        "mfu": meter.mfu(speed),
        "peak_memory_gib": meter.take_memory().peak / 2**30,
        "warm_up_seconds": started - warmed,
        "loss": float(loss),
    }


def meter_of(bench: Bench, size: Training) -> StepMeter:
    """A meter for a peer that trains a model of this size."""
    spec = model_spec(size.model, None)
    flops = training_flops(build_model(spec, dtype=torch.float32), spec)
    return StepMeter(
        device=bench.device, ranks=1,
        flops_per_token=None if flops is None else flops.per_token(size.length),
        peak_flops=peak_of(bench.device, torch.bfloat16),
    )  # fmt: skip
