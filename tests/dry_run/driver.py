"""Runs of `tests.parallel.parity` on the CPU and on a virtual GPU."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.parallel.parity import MODULES, STEPS, Case, run_case


@dataclass
class DryRun:
    """What one rank found in one case."""

    error: str = ""
    """Traceback of what a GPU would not do, or of anything else that failed."""
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    """Of each step: on the CPU, on the device."""
    reads: list[str] = field(default_factory=list)
    """The reasons of `launcher.host_reads` for which the host waited in the steps."""


def dry_run_on_rank(folder: str, cases: Sequence[Case]) -> list[DryRun]:
    """`cases` on the CPU, then on a virtual GPU."""
    import models.attention
    from launcher.parallel import world as worlds
    from tests.dry_run.cuda_calls import fake_cuda
    from tests.dry_run.flash_attention import flash_attention
    from tests.dry_run.virtual_cuda import VirtualCuda

    os.chdir(folder)
    models.attention.MASK_UP_TO = 8  # rows of tests are short: attend within documents in these too
    world = worlds.start(force_cpu=True)
    expected = [run_case(case, world, f"cpu_{n}", _train_step) for n, case in enumerate(cases)]
    worlds.stop(world)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    found: list[DryRun] = []
    with fake_cuda(), flash_attention(), VirtualCuda() as device:
        world = worlds.start()
        for number, case in enumerate(cases):
            device.reads.clear()
            try:
                # The first step may ask what to allocate, and masks of transformers always do.
                step = device.strict(_train_step, after=STEPS if case.family in MODULES else 1)
                outcome = run_case(case, world, f"cuda_{number}", step)
            except Exception:
                found.append(DryRun(traceback.format_exc()))
                break
            both = expected[number].losses, outcome.losses
            found.append(DryRun(losses=both, reads=list(device.reads)))
        if not found[-1].error:
            worlds.stop(world)
    return found + [DryRun("not run: one before failed")] * (len(cases) - len(found))


def _train_step(*arguments: Any) -> Any:
    from launcher.train.step import train_step

    return train_step(*arguments)


def job_on_rank(folder: str, jobs: Sequence[Sequence[str]]) -> list[tuple[int, str, list[str]]]:
    """`run.py` with each of these arguments, one after the other, on a virtual GPU: its exit code,
    what it printed, and why the host waited in steps of training, but for the first, and in those
    of generation, but for the first two."""
    import contextlib
    import io
    from unittest.mock import patch

    from launcher import cli
    from launcher.generation.distributed import DistributedForward
    from launcher.generation.forward import Forward
    from launcher.generation.sampling import Chooser
    from launcher.train import loop
    from tests.dry_run.cuda_calls import fake_cuda
    from tests.dry_run.flash_attention import flash_attention
    from tests.dry_run.virtual_cuda import VirtualCuda

    os.chdir(folder)
    cli.ECHO_DELAY_SECONDS = 0.0
    found = []
    with fake_cuda(), flash_attention(), VirtualCuda() as device:
        for number, arguments in enumerate(jobs):
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + bool(number))
            device.reads.clear()
            out, step = io.StringIO(), device.strict(loop.train_step, after=1)
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(out),
                patch.object(loop, "train_step", step),
                contextlib.ExitStack() as stack,
            ):
                for owner, name in (
                    (Forward, "__call__"), (DistributedForward, "__call__"), (Chooser, "choose")
                ):  # fmt: skip
                    called = device.strict(getattr(owner, name), after=2)
                    stack.enter_context(patch.object(owner, name, called))
                code = cli.main(list(arguments))
            found.append((code, out.getvalue(), list(device.reads)))
    return found
