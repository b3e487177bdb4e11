"""Files of an earlier run in the same folder: renamed, never overwritten."""

from __future__ import annotations

import os
from pathlib import Path


def move_aside(path: Path) -> Path:
    """Rename a file of an earlier run, `metrics.jsonl` to `metrics-1.jsonl` with the first free
    number. Returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def make_way(path: Path, content: bytes) -> None:
    """Move the file at `path` aside if its content differs from `content`."""
    if path.is_file() and path.read_bytes() != content:
        move_aside(path)


def move_to_numbered_folder(path: Path) -> Path:
    """Move a file of an earlier run, `strategy/x` to `strategy-1/x` or the first folder without it.
    Returns the new path."""
    number = 1
    while (aside := path.parent.with_name(f"{path.parent.name}-{number}") / path.name).exists():
        number += 1
    aside.parent.mkdir(exist_ok=True)
    os.replace(path, aside)
    return aside


def write_new(path: Path, text: str) -> None:
    """Write a text file; an existing one with other content is moved aside first."""
    make_way(path, text.encode())
    path.write_text(text)
