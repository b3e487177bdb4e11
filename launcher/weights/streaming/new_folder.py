"""Folders that appear whole: written aside, renamed when complete.

Owns how a tool makes its output. Invariants: an input is never written to; a folder that has
something in it is replaced only when that is asked for, and only after the new one is whole; what
an interrupted writer left behind is cleared by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import UserError


@contextmanager
def folder_aside(
    target: Path, source: Path, *, overwrite: bool, option: str = "--output_dir"
) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends well, and is gone when it does not.

    `source`: what is read, which `target` must lie apart from. `option`: what the user calls
    `target`. Raises `UserError` when `target` may not be written, or cannot.
    """
    _check_apart(target, source, option)
    _check_free(target, overwrite, option)
    place = Path(os.path.realpath(target))
    scratch = place.with_name(f".{place.name}.tmp")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(scratch, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(target, option, error) from error
    try:
        _lock(descriptor, target)
        _recover(place)
        _clear(scratch)
        try:
            yield scratch
            _rename(scratch, place, option)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _check_apart(target: Path, source: Path, option: str) -> None:
    inside, outside = (Path(os.path.realpath(path)) for path in (source, target))
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise UserError(
            f"{target} holds, or lies in, {source}",
            rule="an input is never written to",
            advice=f"Give another {option}",
        )


def _check_free(target: Path, overwrite: bool, option: str) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(
            f"{target} is a file", rule="a folder is needed", advice=f"Give another {option}"
        )
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"{target} is not empty",
            rule="existing files are not replaced by default",
            advice=f"Give another {option}, or --overwrite",
        )


def _lock(descriptor: int, target: Path) -> None:
    """Hold the folder until it is closed; the system lets go of it when a process is killed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{target} is being written by another process",
            rule="one writes it at a time",
            advice="Wait for the other one, or end it",
        ) from None
    except OSError:
        return  # a file system without locks


def _clear(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _rename(scratch: Path, target: Path, option: str) -> None:
    """The old folder steps aside, the new one takes its name, and only then the old one goes."""
    old = _old(target)
    try:
        if target.is_dir():
            os.replace(target, old)
        os.replace(scratch, target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as error:
        _recover(target)
        if isinstance(error, OSError):
            raise _unwritable(target, option, error) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    """Where a folder waits while it is replaced."""
    return target.with_name(f".{target.name}.old.tmp")


def _recover(target: Path) -> None:
    """What an interrupt left of a replacement: the old folder gets its name back if no new one has
    it, else it goes."""
    old = _old(target)
    if old.is_dir() and not target.exists():
        os.replace(old, target)
    elif old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def _unwritable(target: Path, option: str, error: OSError) -> UserError:
    return UserError(
        f"{target} cannot be written: {error.strerror}",
        rule="its folder must exist or be made, and be writable",
        advice=f"Give another {option}",
    )
