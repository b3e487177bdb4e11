"""Finding the files of a dataset: what `dataset_dir` and `dataset_files` mean on disk.

Invariants: the list of files and its order depend on names only (code point order of the relative
path, not the locale or the file system); a folder is read once, however many symbolic links point
to it, so loops end; hidden files and folders inside a folder are skipped, as are files with other
suffixes; a path that the user names is never skipped.
"""

from __future__ import annotations

import errno
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file as it was found; path, size and time are part of the key of the cache."""

    path: Path
    size: int
    """Bytes."""
    mtime_ns: int
    below: str = ""
    """The path relative to the folder it was found in; empty for a file that the user named."""
    split: str = ""
    """The split it was chosen for; empty for files that have none."""


def find_files(
    places: Sequence[str],
    suffixes: Sequence[str],
    *,
    suffixes_apply_to_globs: bool = False,
    suffix_advice: str = "",
) -> list[DataFile]:
    """The files of `places` (each a file, a folder or a glob), in a reproducible order.

    `suffixes` (such as ".txt", case-insensitive) filter files inside folders, and the matches of a
    glob with `suffixes_apply_to_globs`. Raises UserError for a place that does not exist, and when
    no file is left.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes)
    found: dict[Path, str] = {}
    skipped: Counter[str] = Counter()
    for place in places:
        for path, below in _files_of_place(place, wanted, suffixes_apply_to_globs, skipped):
            found.setdefault(path, below)
    if not found:
        raise _nothing_found(places, wanted, skipped, suffix_advice)
    return [data_file(path, below) for path, below in found.items()]


def _files_of_place(
    place: str, wanted: tuple[str, ...], filter_globs: bool, skipped: Counter[str]
) -> Iterator[tuple[Path, str]]:
    path = Path(place).expanduser()
    if path.is_dir():
        yield from _walk(path, wanted, skipped)
    elif path.exists():
        yield path, ""
    elif glob.has_magic(place):
        for match in sorted(
            glob.glob(str(path), recursive=True), key=lambda name: Path(name).parts
        ):
            if os.path.isdir(match):
                yield from _walk(Path(match), wanted, skipped)
            elif not filter_globs or match.lower().endswith(wanted):
                yield Path(match), ""
            else:
                skipped[Path(match).suffix or "no suffix"] += 1
    else:
        raise _absent(path)


def _walk(
    folder: Path, wanted: tuple[str, ...], skipped: Counter[str]
) -> Iterator[tuple[Path, str]]:
    visited: set[tuple[int, int]] = set()

    def walk(current: Path) -> Iterator[Path]:
        try:
            status = current.stat()
            names = sorted(os.listdir(current))
        except OSError as error:
            raise unreadable(current, error) from error
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        for name in names:
            path = current / name
            if name.startswith("."):
                continue
            if path.is_dir():
                yield from walk(path)
            elif name.lower().endswith(wanted):
                yield path
            else:
                skipped[path.suffix or "no suffix"] += 1

    for path in walk(folder):
        yield path, path.relative_to(folder).as_posix()


def data_file(path: Path, below: str = "") -> DataFile:
    """One file as it is now. Raises UserError when it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return DataFile(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, below=below)


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file or folder that exists and cannot be read."""
    remedy = "Copy or compress it again"
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "Give read permission"
    elif error.errno:
        remedy = "Check the file"
    return UserError(
        f"cannot be read ({error.strerror or error})",
        where=str(path),
        rule="every file of a dataset must be readable",
        advice=f"{remedy}, or remove it from the dataset",
    )


def _absent(path: Path) -> UserError:
    nearest = ""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if parent.is_dir() and os.access(parent, os.R_OK):
        nearest = did_you_mean(path.relative_to(parent).parts[0], os.listdir(parent))
        if not nearest:
            nearest = f"The part that exists is {parent.resolve()}"
    return UserError(
        f"data_loader: {str(path)!r} does not exist",
        rule="dataset_dir and dataset_files must be a file, a folder or a glob",
        nearest=nearest,
        advice="Relative paths are resolved against the current directory",
    )


def _nothing_found(
    places: Sequence[str],
    wanted: tuple[str, ...],
    skipped: Counter[str],
    suffix_advice: str,
) -> UserError:
    shown = ", ".join(repr(str(place)) for place in places)
    if skipped:
        others = ", ".join(
            f"{count} {suffix if suffix == 'no suffix' else '*' + suffix}"
            for suffix, count in skipped.most_common(5)
        )
        return UserError(
            f"data_loader: {shown} has no file ending in {', '.join(wanted)}",
            rule="a dataset needs at least one file",
            nearest=f"Found instead: {others}",
            advice=suffix_advice,
        )
    return UserError(
        f"data_loader: {shown} has no file",
        rule="a dataset needs at least one file",
        advice="Put files there, or give another path",
    )
