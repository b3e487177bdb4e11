"""Durable and atomic file operations, which survive a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"


def sync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    """The temporary path that is renamed to `path`."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def publish(written: Path, path: Path) -> None:
    """Rename a durable temporary file to its final name, atomically and durably."""
    os.replace(written, path)
    sync_directory(path.parent)


def json_bytes(content: dict[str, Any]) -> bytes:
    """`content` as the text of a file."""
    return (json.dumps(content, indent=1) + "\n").encode()


def write_json(path: Path, content: dict[str, Any], *, durable: bool = True) -> None:
    """As `write_bytes`, for a JSON object."""
    write_bytes(path, json_bytes(content), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` to `path` atomically: a reader sees the old file or the new one.

    Not `durable`: a power failure may undo it, and no time is spent on `fsync`.
    """
    scratch = temporary(path)
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    if durable:
        publish(scratch, path)
    else:
        os.replace(scratch, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`, or None when it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
