"""Runs of `tests.parallel.parity` on a virtual GPU: each must do what the CPU does, to the bit."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.parallel.parity import Case, Outcome, run_case


@dataclass
class DryRun:
    """What one rank found in one case."""

    error: str = ""
    """Traceback of what a GPU would not do, or of anything else that failed."""
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    """Of each step: on the CPU, on the device."""
    differing: list[str] = field(default_factory=list)
    """Parameters that are not equal at the end."""
    reads: list[str] = field(default_factory=list)
    """The reasons of `launcher.host_reads` for which the host waited in the steps."""


def dry_run_on_rank(folder: str, cases: Sequence[Case]) -> list[DryRun]:
    """`cases` on the CPU, then on a virtual GPU."""
    from launcher.parallel import world as worlds
    from tests.dry_run.cuda_calls import fake_cuda
    from tests.dry_run.virtual_cuda import VirtualCuda

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    expected = [run_case(case, world, f"cpu_{n}", _train_step) for n, case in enumerate(cases)]
    worlds.stop(world)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    found: list[DryRun] = []
    with fake_cuda(), VirtualCuda() as device:
        world = worlds.start()
        for number, case in enumerate(cases):
            device.reads.clear()
            try:
                step = device.strict(_train_step, after=1)  # the first may ask what to allocate
                outcome = run_case(case, world, f"cuda_{number}", step)
            except Exception:
                found.append(DryRun(traceback.format_exc()))
                break
            found.append(_compared(expected[number], outcome, list(device.reads)))
        if not found[-1].error:
            worlds.stop(world)
    return found + [DryRun("not run: one before failed")] * (len(cases) - len(found))


def _train_step(*arguments: Any) -> Any:
    from launcher.train.step import train_step

    return train_step(*arguments)


def _compared(expected: Outcome, found: Outcome, reads: list[str]) -> DryRun:
    import numpy as np

    differing = [
        name for name, (_, _, values) in expected.parameters.items()
        if not np.array_equal(values, found.parameters[name][2])
    ]  # fmt: skip
    return DryRun("", (expected.losses, found.losses), differing, reads)
