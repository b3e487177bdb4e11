"""metrics.jsonl: one JSON object a line, one line an optimizer step, one an evaluation.

Invariants: samples in the file never run backwards; no row of another run is lost. A run that goes
on under its own name drops the rows after its newest save, which it is about to make again. Any
other run first moves the file of the run before it aside, to `metrics-1.jsonl` and so on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from enum import Enum
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from launcher.report.aside import move_aside

FILE_NAME = "metrics.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of the file; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Start(Enum):
    """What a run is to the rows that an earlier run left in its folder."""

    FRESH = "fresh"
    """Another run: none of them belongs to it."""
    SAME = "same"
    """The run that wrote them, after an interruption."""
    BRANCH = "branch"
    """A run that goes on from an earlier save of the run that wrote them: it shares the first."""


class MetricsLog:
    """Appends rows. `consumed_samples`: how far the run is that this one goes on from."""

    def __init__(self, output_dir: Path, start: Start, consumed_samples: int = 0) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / FILE_NAME
        self.moved_to: Path | None = None
        """Where the file of an earlier run is now."""
        if self.path.exists():
            if start is not Start.SAME:
                self.moved_to = move_aside(self.path)
            if start is Start.BRANCH:
                shutil.copyfile(self.moved_to or self.path, self.path)
            if start is not Start.FRESH:
                _drop_after(self.path, consumed_samples)
        self._file: TextIO = self.path.open("a")

    def go_back(self, consumed_samples: int) -> None:
        """Drop the rows after a place that the run goes back to."""
        self._file.close()
        _drop_after(self.path, consumed_samples)
        self._file = self.path.open("a")

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, at once. Numbers that JSON has no word for become null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _drop_after(path: Path, consumed_samples: int) -> None:
    # By samples: steps are counted anew when the global batch changes.
    rows = list(
        takewhile(lambda row: row.get("consumed_samples", 0) <= consumed_samples, read_rows(path))
    )
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(scratch, path)
