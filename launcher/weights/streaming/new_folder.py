"""Folders that appear complete: written under a temporary name, then renamed.

Owns how a tool makes its output. Invariants: an input is never written to; a non-empty folder is
replaced only with `overwrite`, and only after the new one is complete; a folder with files that no
tool writes, or that a process works in, is not replaced; what an interrupted writer left is removed
by the next one.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import UserError

_OWN_FILE = re.compile(
    r"[^.].*\.(safetensors|json|jinja|model|ckpt|bin|pt|pth)|README\.md|(merges|vocab)\.txt|LICENSE.*"
)
_OWN_FOLDER = re.compile(r"rank_\d+|additional_chat_templates")


@contextmanager
def folder_aside(
    target: Path,
    source: Path,
    *,
    overwrite: bool,
    owned: bool = False,
    option: str = "--output_dir",
) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block succeeds, and is removed when it fails.

    `source`: the input, which must not overlap `target`. `owned`: the folder is that of a run,
    which nobody else writes to. `option`: the option that sets `target`.
    Raises `UserError` when `target` may not be written, or cannot.
    """
    check_apart(target, source, option)
    _check_free(target, overwrite, option)
    if not owned:
        _check_replaceable(target, option)
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


def check_apart(target: Path, source: Path, option: str = "--output_dir") -> None:
    """Raise `UserError` where an output overlaps an input, which would be replaced."""
    inside, outside = (Path(os.path.realpath(path)) for path in (source, target))
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise UserError(
            f"{target} contains, or is in, {source}",
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


def _check_replaceable(target: Path, option: str) -> None:
    """`--overwrite` removes a folder with all that is in it: only one that a tool has written."""
    if not target.is_dir():
        return
    if Path.cwd().is_relative_to(os.path.realpath(target)):
        raise UserError(
            f"{target} is, or contains, the current directory",
            rule="it would be replaced with all that is in it",
            advice=f"Give another {option}",
        )
    foreign = next(_foreign(target), None)
    if foreign is not None:
        raise UserError(
            f"{target} has other files than weights and a tokenizer: {foreign}",
            rule="--overwrite replaces the folder with all that is in it",
            advice=f"Give another {option}, or move the files away",
        )


def _foreign(folder: Path) -> Iterator[Path]:
    """Files below a folder that no tool for weights writes."""
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and _OWN_FOLDER.fullmatch(child.name):
            yield from _foreign(child)
        elif child.is_dir() or not _OWN_FILE.fullmatch(child.name):
            yield child


def _lock(descriptor: int, target: Path) -> None:
    """Lock the folder until its descriptor is closed, at the latest when the process ends."""
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
    """Rename the old folder, rename the new one, and only then remove the old one."""
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
    """The name of a folder while it is being replaced."""
    return target.with_name(f".{target.name}.old.tmp")


def _recover(target: Path) -> None:
    """Finish an interrupted replacement: restore the old folder if there is no new one, or else
    remove it."""
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
