"""Which MindRecord files a path means.

Owns three rules of MindSpore and MindFormers. One file means its family, all files that were
written together, in the order of their header. A list of files means exactly these, in its order. A
folder or a glob means the files below it whose names end in `mindrecord` and maybe digits, sorted
as complete paths. Index files (`.db`) are never needed. Standard library only.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError, did_you_mean
from launcher.mindspore.mindrecord.header import Header, read_header

_NAME = re.compile(r"mindrecord\d*$")
_DIGITS = re.compile(r"\d*$")


@dataclass(frozen=True, kw_only=True)
class RecordFiles:
    """The files of a data set, in order."""

    headers: tuple[Header, ...]
    notes: tuple[str, ...] = ()
    """Lines about files that were renamed or left out."""

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(header.rows for header in self.headers)


def find_records(places: Sequence[str], *, is_list: bool = False) -> RecordFiles:
    """The files that `places` name, their headers read and checked.

    `is_list`: the user wrote a list, whose files are taken alone. Raises UserError for a place
    that does not exist or has no such file, a missing shard, damage, and files of different
    schemas.
    """
    alone, paths = is_list or len(places) > 1, list[Path]()
    families = list[Header]()
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir() or (not path.exists() and glob.has_magic(place)):
            found = list(_below(path) if path.is_dir() else _matches(str(path)))
            if not found:
                raise _nothing(place)
            paths += found
        elif not path.exists():
            raise _absent(path)
        elif alone:
            paths.append(path)
        else:
            families += _family(read_header(path))
    headers = [*families, *map(read_header, paths)]
    _check_same_schema(headers)
    return RecordFiles(headers=tuple(headers), notes=tuple(_notes(headers)))


def _below(folder: Path) -> list[Path]:
    found, visited = [], set[tuple[int, int]]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        found += [os.path.join(parent, name) for name in names if _NAME.search(name)]
    return [Path(name) for name in sorted(found)]


def _matches(pattern: str) -> Iterator[Path]:
    for name in sorted(glob.glob(pattern, recursive=True)):
        if _NAME.search(name) and os.path.isfile(name):
            yield Path(name)


def _family(header: Header) -> list[Header]:
    """The headers of all files that were written with one of them."""
    if len(header.family) == 1:
        return [header]
    folder = header.path.parent
    missing = [name for name in header.family if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(header.family)} files that were written together "
            f"are missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
            where=str(header.path),
            rule="a file of several is read with all of them",
            nearest=f"It was written as {header.family[header.shard]}" if header.is_renamed else "",
            advice="Copy the missing files beside it, or give a list of files to read these alone",
        )
    return [read_header(folder / name) for name in header.family]


def _notes(headers: Sequence[Header]) -> Iterator[str]:
    given = {(header.path.parent.resolve(), header.path.name) for header in headers}
    for header in headers:
        if header.is_renamed:
            yield (f"note: {header.path} was written as {header.family[header.shard]}: MindSpore "
                   "does not open a renamed file")  # fmt: skip
    missing = dict.fromkeys(
        str(header.path.parent / name) for header in headers if not header.is_renamed
        for name in header.family if (header.path.parent.resolve(), name) not in given
    )  # fmt: skip
    if missing:
        names = list(missing)
        yield (f"warning: {len(names)} file(s) that were written together with those of this data "
               f"set are not part of it: {', '.join(names[:5])}"
               f"{', ...' if len(names) > 5 else ''}")  # fmt: skip


def _check_same_schema(headers: Sequence[Header]) -> None:
    for other in headers[1:]:
        first = headers[0]
        if other.fields != first.fields or other.blob_fields != first.blob_fields:
            ours, theirs = (_shown(header) for header in (first, other))
            raise UserError(
                f"its columns are {theirs}",
                where=str(other.path),
                rule=f"all files of a data set have the same columns; {first.path} has {ours}",
                advice="Give the files as two data loaders of a mixture",
            )


def _shown(header: Header) -> str:
    return ", ".join(
        f"{field.name} {field.type}{'' if field.shape is None else list(field.shape)}"
        for field in header.fields
    )


def _absent(path: Path) -> UserError:
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    records = [name for name in names if _NAME.search(name)]
    near = did_you_mean(path.name, records)
    if not near and records:
        near = f"`{path.parent}` contains {', '.join(sorted(records)[:5])}"
    return UserError(
        f"data_loader: {str(path)!r} does not exist",
        rule="MindDataset reads MindRecord files",
        nearest=near,
        advice="Relative paths are resolved against the current directory",
    )


def _nothing(place: str) -> UserError:
    path = Path(place)
    names = sorted({_DIGITS.sub("", child.suffix) or child.name for child in path.iterdir()}
                   if path.is_dir() else ())  # fmt: skip
    return UserError(
        f"data_loader: {place!r} has no MindRecord file",
        rule="MindDataset takes the files whose names end in `mindrecord` or `mindrecord0` ... "
        "from a folder",
        nearest=f"Found instead: {', '.join(names[:5])}" if names else "",
        advice="A file with another name can be given by its path",
    )
