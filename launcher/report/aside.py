"""Files of an earlier run in the folder of this one: renamed, never written over."""

from __future__ import annotations

import os
from pathlib import Path


def move_aside(path: Path) -> Path:
    """Rename a file of an earlier run, `metrics.jsonl` to `metrics-1.jsonl`: the first number that
    is free. Returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def write_new(path: Path, text: str) -> None:
    """Write a text file; one with other content that lies there is moved aside first."""
    if path.exists():
        if path.read_bytes() == text.encode():
            return
        move_aside(path)
    path.write_text(text)
