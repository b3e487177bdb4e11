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


def make_way(path: Path, content: bytes) -> None:
    """Move a file aside that lies at `path` with other content than `content`."""
    if path.is_file() and path.read_bytes() != content:
        move_aside(path)


def move_to_numbered_folder(path: Path) -> Path:
    """Move a file of an earlier run, `strategy/x` to `strategy-1/x`: the first folder without it.
    Returns the new path."""
    number = 1
    while (aside := path.parent.with_name(f"{path.parent.name}-{number}") / path.name).exists():
        number += 1
    aside.parent.mkdir(exist_ok=True)
    os.replace(path, aside)
    return aside


def write_new(path: Path, text: str) -> None:
    """Write a text file; one with other content that lies there is moved aside first."""
    make_way(path, text.encode())
    path.write_text(text)
