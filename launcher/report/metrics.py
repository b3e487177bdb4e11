"""metrics.jsonl: one JSON object per line, for each optimizer step and each evaluation.

Invariants: `consumed_samples` never decreases in the file; no row of another run is lost. A run
that resumes under its own name drops the rows after its newest save, which it will write again. Any
other run first moves the existing file aside, to `metrics-1.jsonl` and so on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from enum import Enum
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from launcher.report.aside import move_aside

FILE_NAME = "metrics.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of the file, without a last line that a crash truncated."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Start(Enum):
    """How a run relates to the rows that an earlier run wrote into its folder."""

    FRESH = "fresh"
    """A new run: it shares none of them."""
    SAME = "same"
    """The run that wrote them, resumed."""
    BRANCH = "branch"
    """A run resumed from an earlier save of the run that wrote them: it shares the first ones."""


class MetricsLog:
    """Appends rows. `consumed_samples`: those at the save that the run is resumed from."""

    def __init__(self, output_dir: Path, start: Start, consumed_samples: int = 0) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / FILE_NAME
        self.moved_to: Path | None = None
        """The new path of the file of an earlier run."""
        if self.path.exists():
            if start is not Start.SAME:
                self.moved_to = move_aside(self.path)
            if start is Start.BRANCH:
                shutil.copyfile(self.moved_to or self.path, self.path)
            if start is not Start.FRESH:
                _drop_after(self.path, consumed_samples)
        self._file: TextIO = self.path.open("a")

    def go_back(self, consumed_samples: int) -> None:
        """Drop the rows after the save that the run is rolled back to."""
        self._file.close()
        _drop_after(self.path, consumed_samples)
        self._file = self.path.open("a")

    def add(self, row: dict[str, Any]) -> None:
        """Write and flush one row. Values that JSON cannot represent (NaN, inf) become null."""
        self._file.write(json.dumps(finite(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
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


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None for the values that JSON cannot represent (NaN, inf)."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _drop_after(path: Path, consumed_samples: int) -> None:
    # By samples, since the step count changes with the global batch size.
    rows = list(
        takewhile(lambda row: row.get("consumed_samples", 0) <= consumed_samples, read_rows(path))
    )
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(scratch, path)
