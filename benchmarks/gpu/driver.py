"""Sections of cases, each in its own try, and one JSON line for each as soon as it is known.

Owns the order, the deadline and the form of a line. Invariants: a case that fails, or a section
that cannot even list its cases, leaves the others alone; nothing begins after the deadline; every
line is on disk when the next case begins; memory of a case is free before the next.

    {"section": "train_1b", "case": "packed", "at": 93.1, "seconds": 17.2, "mfu": 0.47, ...}
    {"section": "train_8b", "case": "plain loop", "at": 240.0, "seconds": 1.1, "error": "..."}
    {"section": "decode", "at": 480.2, "skipped": "the deadline of 8 minutes"}
"""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.gpu.sizes import Sizes
from launcher.parallel.world import World

Figures = Mapping[str, Any]
"""What a case found: names with their units to numbers, texts or lists of these."""


@dataclass(frozen=True)
class Case:
    """One measurement or comparison."""

    name: str
    run: Callable[[], Figures]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cases share."""

    world: World
    sizes: Sizes
    folder: Path
    """Scratch space: data, weights, checkpoints."""

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return self.world.device

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def now(self) -> float:
        """Seconds, when all work of the device so far is done."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Section:
    """Cases about one thing."""

    name: str
    cases: Callable[[Bench], Iterable[Case]]


@dataclass(kw_only=True)
class Report:
    """The lines of a run, to all of `files`."""

    files: Sequence[TextIO]
    started: float = field(default_factory=time.perf_counter)
    failed: int = 0

    def add(self, section: str, figures: Figures, case: str | None = None) -> None:
        """Write and flush one line."""
        at = {"section": section} | ({} if case is None else {"case": case})
        row = at | {"at": round(time.perf_counter() - self.started, 1)} | dict(figures)
        self.failed += "error" in figures
        for file in self.files:
            file.write(json.dumps(_plain(row)) + "\n")
            file.flush()


def run_sections(
    sections: Iterable[Section], bench: Bench, report: Report, *, minutes: float
) -> None:
    """Run the sections, none of whose cases begins after `minutes`."""
    deadline = report.started + 60 * minutes
    for section in sections:
        if time.perf_counter() >= deadline:
            report.add(section.name, {"skipped": f"the deadline of {minutes:g} minutes"})
            continue
        try:
            for case in section.cases(bench):
                if time.perf_counter() >= deadline:
                    reason = f"the deadline of {minutes:g} minutes"
                    report.add(section.name, {"skipped": reason}, case.name)
                else:
                    report.add(section.name, _outcome(case, bench), case.name)
        except Exception as error:
            report.add(section.name, _error(error))


def _outcome(case: Case, bench: Bench) -> Figures:
    default_kernels()
    started = time.perf_counter()
    try:
        found: Figures = case.run()
    except Exception as error:  # the others still run
        found = _error(error)
    seconds = time.perf_counter() - started
    _free(bench)
    return {"seconds": round(seconds, 2), **found}


def default_kernels() -> None:
    """Kernels as PyTorch chooses them by itself, for peers: a run chooses its own."""
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    for enable in (
        torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_math_sdp, torch.backends.cuda.enable_cudnn_sdp,
    ):  # fmt: skip
        enable(True)


def _error(error: Exception) -> Figures:
    lines = traceback.format_exception(error)
    return {
        "error": f"{type(error).__name__}: {error}"[:2000],
        "traceback": "".join(lines).splitlines()[-12:],
    }


def _free(bench: Bench) -> None:
    """Give back the memory of a case on the device: graphs of torch.compile hold on to it too."""
    if bench.on_cuda:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)


def _plain(value: Any) -> Any:
    """A value of JSON with four digits: NaN and infinities become texts."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | str | None) else str(value)
