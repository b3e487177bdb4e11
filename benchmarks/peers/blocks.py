"""Blocks of training steps that start when another process says so.

Owns the child's side of `benchmarks.measure.Paced`, for any trainer: after each block it writes the
seconds that the block took to one pipe, and waits for a line of the other. Processes that are
compared so stay alive, with what they have compiled and cached, and never run at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.train.callbacks import Callback

if TYPE_CHECKING:
    from launcher.train.run import TrainRun
    from launcher.train.step import StepRecord


class Pacer:
    """Counts steps. `folder` has the pipes `go` and `done`."""

    def __init__(self, folder: str, each: int) -> None:
        self.each, self.steps = each, 0
        self._go = Path(folder, "go").open()  # noqa: SIM115 - open as long as the run
        self._done = Path(folder, "done").open("w", buffering=1)  # noqa: SIM115
        self._started = time.perf_counter()

    def wait(self) -> None:
        """Wait for the first block."""
        self._go.readline()
        self._started = time.perf_counter()

    def count(self) -> None:
        """A step has ended."""
        self.steps += 1
        if self.steps % self.each:
            return
        self._done.write(f"{time.perf_counter() - self._started}\n")
        self.wait()


class Blocks(Callback):
    """A callback for this launcher (`register_path`)."""

    def __init__(self, folder: str, each: int) -> None:
        self.pacer = Pacer(folder, each)

    def on_train_begin(self, run: TrainRun) -> None:
        self.pacer.wait()

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for _ in records:
            self.pacer.count()
