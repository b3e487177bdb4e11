"""metrics.jsonl: one JSON object a line, one line an optimizer step, one an evaluation.

Invariant: samples in the file never run backwards. A resumed run first drops the rows after the
place it resumes from (they are about to be made again); a fresh run puts an older file aside.
"""

from __future__ import annotations

import json
import math
import os
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

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


class MetricsLog:
    """Appends rows. `consumed_samples`: how far the run is that is gone on from; 0: a fresh one."""

    def __init__(self, output_dir: Path, consumed_samples: int) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / FILE_NAME
        if self.path.exists():
            if consumed_samples:
                _drop_after(self.path, consumed_samples)
            else:
                _put_aside(self.path)
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


def _put_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"metrics-{number}.jsonl")).exists():
        number += 1
    os.replace(path, aside)
