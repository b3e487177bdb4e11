"""Recording some steps with torch.profiler.

Owns the window of steps and the files of a profile. Invariants: exactly the steps of the window are
recorded, each with its report, evaluation and save, also within a sink; a run that resumes in the
window records the rest of it, one that resumes after it nothing. A file appears under its name when
it is complete, also when the run ends early or fails. What cannot be written is a warning: the run
goes on.

    {folder}/rank_0/steps_3-5.trace.json.gz        Chrome's trace format: https://ui.perfetto.dev
                    steps_3-5.operations.txt       the slowest operations
                    steps_3-5.communication.txt    collectives (profile_communication)
                    steps_3-5.memory.pickle        allocations (profile_memory_snapshot, on CUDA):
                                                   https://pytorch.org/memory_viz
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.report.ranges import mark_for_nsight

STEP = "ProfilerStep#"
"""Beginning of the name of the range of a step, with its number: what tools that read traces of
torch.profiler look for."""
ROWS = 50
"""Of the table of operations."""
MOST_ALLOCATIONS = 200_000
"""Newest events of a memory snapshot."""
COLLECTIVES = ("nccl:", "gloo:", "c10d::", "record_param_comms", "ncclDevKernel")


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What is recorded."""

    start: int
    """First step, from 1; 0: from the start of the job."""
    stop: int
    """Last step."""
    shapes: bool
    """Of the inputs of operations."""
    flops: bool
    """Of products and convolutions."""
    memory: bool
    stack: bool
    communication: bool
    """Whether there is a table of collectives."""
    memory_snapshot: bool
    nsight: bool
    """Whether named ranges are marked for Nsight Systems too."""


class StepProfiler:
    """Records the steps of a window, on one rank. A context: at its end what is recorded so far is
    written."""

    def __init__(
        self,
        settings: ProfileSettings,
        folder: Path,
        device: torch.device,
        log: Callable[[str], None],
    ) -> None:
        """`folder`: that of this rank."""
        self.settings, self.folder, self.log = settings, folder, log
        self._on_cuda = device.type == "cuda"
        self._recorder: profile | None = None
        self._is_done = False
        self._range: record_function | None = None
        self._first, self._last = settings.start, 0

    def __enter__(self) -> StepProfiler:
        if self.settings.nsight and self._on_cuda:
            mark_for_nsight(True)
        if self.settings.start == 0:
            self._start(0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()
        mark_for_nsight(False)
        if not self._is_done and error is None:
            self.log(f"profile: nothing was recorded: no step from {self.settings.start} to "
                     f"{self.settings.stop} was trained")  # fmt: skip

    def begin_step(self, step: int) -> None:
        """Before optimizer step `step`, from 1."""
        self.end_steps(step - 1)
        if self._recorder is None and not self._is_done and self._is_in_window(step):
            self._start(step)
        if self._recorder is not None:
            self._last = step
            self._range = record_function(f"{STEP}{step}")
            self._range.__enter__()

    def end_steps(self, done: int) -> None:
        """After optimizer step `done` and all that belongs to it."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._recorder is not None and done >= self.settings.stop:
            self._finish()

    def _is_in_window(self, step: int) -> bool:
        return self.settings.start <= step <= self.settings.stop

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
            if self.settings.memory_snapshot:
                torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self._first = step
        self._recorder = profile(
            activities=activities,
            record_shapes=self.settings.shapes or self.settings.communication,
            with_flops=self.settings.flops,
            profile_memory=self.settings.memory,
            with_stack=self.settings.stack,
        )
        self._recorder.start()

    def _finish(self) -> None:
        """Stop recording and write the files."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._on_cuda:
            torch.cuda.synchronize()  # kernels of the last step belong to it
        recorder.stop()
        self._is_done = True
        try:
            trace = self._write_files(recorder)
        except OSError as error:  # a full disk takes the profile, not the run
            self.log(f"warning: profile: {self.folder}: nothing more was written: {error}")
        else:
            self.log(f"profile: steps {max(self._first, 1)} to {self._last}: {trace} (open it in "
                     "https://ui.perfetto.dev)")  # fmt: skip
        finally:
            if self.settings.memory_snapshot and self._on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write_files(self, recorder: profile) -> Path:
        """Write what was recorded, and return the path of the trace."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self._written("trace.json.gz", recorder.export_chrome_trace)
        averages: Any = recorder.key_averages()
        self._write_text("operations.txt", _operations(averages, on_cuda=self._on_cuda))
        if self.settings.communication:
            by_shape: Any = recorder.key_averages(group_by_input_shape=True)
            self._write_text("communication.txt", _collectives(by_shape))
        if self.settings.memory_snapshot and self._on_cuda:
            self._written("memory.pickle", torch.cuda.memory._dump_snapshot)
        return trace

    def _write_text(self, kind: str, text: str) -> None:
        self._written(kind, lambda path: Path(path).write_text(text, encoding="utf-8"))

    def _written(self, kind: str, write: Callable[[str], object]) -> Path:
        """The file of this kind, written by `write` under a temporary name."""
        path = self.folder / f"steps_{self._first}-{self._last}.{kind}"
        scratch = path.with_name(f"writing-{path.name}")
        try:
            write(str(scratch))
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        return path


def _operations(averages: Any, *, on_cuda: bool) -> str:
    """The slowest operations, those of the device by their own time there."""
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    text: str = averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
    return text


def _collectives(averages: Any) -> str:
    """One line for each collective and shape, the longest first."""
    found = [event for event in averages if str(event.key).startswith(COLLECTIVES)]
    found.sort(key=lambda event: -(event.device_time_total or event.cpu_time_total))
    lines = [
        f"{'calls':>7}  {'CPU ms':>10}  {'device ms':>10}  collective and shapes of its inputs"
    ]
    lines += [
        f"{event.count:>7}  {event.cpu_time_total / 1000:>10.3f}  "
        f"{event.device_time_total / 1000:>10.3f}  {event.key} {event.input_shapes or ''}".rstrip()
        for event in found
    ]
    return "\n".join(lines) + "\n"
