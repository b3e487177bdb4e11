"""A callback for this launcher (`register_path`): writes the time at the end of every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from launcher.train.callbacks import Callback
from launcher.train.run import TrainRun
from launcher.train.step import StepRecord


class Stamps(Callback):
    """One line a step, seconds of the clock that all processes share."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w", buffering=1)  # noqa: SIM115 - open as long as the run

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        self._file.write(f"{time.time()}\n")

    def on_train_end(self, run: TrainRun) -> None:
        self._file.close()
