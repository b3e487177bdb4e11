"""Files of records: which ones a data loader means, and their records.

Owns the choice of files by split, the reader of each format, and the order of what happens to
records: the slice of `split`, `transforms` one after the other, `column_map`. Invariant: what a
step sees depends on the files and the configuration only, in the order of the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, Protocol, TypeVar

from launcher.config.schema import DataLoaderSection
from launcher.config.schema.splits import SplitPart, WrongSplit, parse_split
from launcher.config.schema.transforms import Transform, parse_transform
from launcher.data.arrow_files import (
    files_of_saved_dataset,
    is_saved_dataset,
    read_arrow_records,
)
from launcher.data.column_map import map_columns
from launcher.data.files import DataFile, find_files
from launcher.data.records import (
    JSON,
    JSON_LINES,
    Record,
    read_json_records,
    read_parquet_records,
)
from launcher.data.tables import read_table_records, read_text_records
from launcher.data.transforms import apply_transform
from launcher.errors import UserError

Records = Iterable[Record | UserError]

SUFFIXES = {
    "json": (*JSON_LINES, *JSON),
    "csv": (".csv", ".csv.gz", ".tsv", ".tsv.gz"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt", ".txt.gz"),
}
"""Format, as a value of `data_loader.path`, to the suffixes of its files."""
RECORD_SUFFIXES = tuple(
    suffix for name, found in SUFFIXES.items() if name != "text" for suffix in found
)
"""Files that are taken from a folder without a format; text is read by TextDataLoader."""


class Found(Protocol):
    """A file as it was found."""

    @property
    def path(self) -> PurePath: ...

    @property
    def below(self) -> str:
        """Its path relative to the folder it was found in; empty for a file that is named."""
        ...


FoundT = TypeVar("FoundT", bound=Found)

_SPLITS = {"train", "validation", "valid", "dev", "test", "eval"}


def find_record_files(section: DataLoaderSection) -> list[DataFile]:
    """The files with records that a section names, of its split or splits."""
    names = list(dict.fromkeys(part.name for part in _parts(section)))
    return [
        replace(file, split=name)
        for name in names
        for file in _files_of_split(section, name, is_one=len(names) == 1)
    ]


def _files_of_split(section: DataLoaderSection, split: str, *, is_one: bool) -> list[DataFile]:
    paths = [path for _, path in section.sources(split)]
    saved = [path for path in paths if is_saved_dataset(Path(path).expanduser())]
    found = [
        file for path in saved for file in files_of_saved_dataset(Path(path).expanduser(), split)
    ]
    others = [path for path in paths if path not in saved]
    if not others and found:
        return found
    if section.record_format:
        suffixes = SUFFIXES[section.record_format]
        advice = f"data_loader.path = {section.record_format!r} is the format; change or remove it"
    else:
        suffixes, advice = RECORD_SUFFIXES, "Text files are read by TextDataLoader"
    files = find_files(others, suffixes, suffix_advice=advice)
    if not isinstance(section.data_files, dict):
        files = with_split(files, split, is_one=is_one)
    return found + files


def with_split(files: list[FoundT], split: str, *, is_one: bool) -> list[FoundT]:
    """The files of one split, by the rule of the Hugging Face hub: the split is a word in their
    name. Files that the user names are always taken where one split is read; without any split in a
    name all is `train`."""
    names = [
        set(re.split(r"[^a-zA-Z0-9]+", (file.below or file.path.name).lower())) for file in files
    ]
    in_folders = [name for file, name in zip(files, names, strict=True) if file.below or not is_one]
    found = set().union(*in_folders) & (_SPLITS | {split})
    if split == "train" and not found:
        return files
    chosen = [
        file
        for file, name in zip(files, names, strict=True)
        if (is_one and not file.below) or split in name
    ]
    if chosen:
        return chosen
    raise UserError(
        f"data_loader.split = {split!r}: none of {len(files)} file(s) has it in its name",
        rule="a file in a folder belongs to the split that is a word of its name",
        nearest=f"Splits found: {', '.join(sorted(found)) or 'none'}",
        advice="Give one of these splits, or name the files in data_loader.dataset_files",
    )


def format_of(path: Path | str, given: str) -> str:
    """The format of a file: by its suffix, else the given one, else JSON lines.

    Raises UserError where the two contradict each other.
    """
    name = str(path).lower()
    known = next((form for form, ends in SUFFIXES.items() if name.endswith(ends)), "")
    if known == "text" and not given:
        return "json"
    if given and known and known != given and given != "text":
        raise UserError(
            f"data_loader.path = {given!r}, and this file is {known}",
            where=str(path),
            rule="path names the format of data_files",
            nearest=f"Nearest: path: {known}",
            advice="Or remove path, and name the files in dataset_files",
        )
    return given or known or "json"


def read_raw_records(path: Path, section: DataLoaderSection, cache_dir: Path) -> Records:
    """The records of one file as they are written; None for null."""
    form = format_of(path, section.record_format)
    if form == "parquet":
        return read_parquet_records(path, cache_dir)
    if form == "csv":
        is_tsv = str(path).lower().removesuffix(".gz").endswith(".tsv")
        return read_table_records(path, section.delimiter or ("\t" if is_tsv else ","))
    return _READERS[form](path)


_READERS: dict[str, Callable[[Path], Records]] = {
    "json": read_json_records,
    "arrow": read_arrow_records,
    "text": read_text_records,
}


def needs_all_files(section: DataLoaderSection) -> bool:
    """Whether the records of a file depend on other files: there are steps, or a slice."""
    return bool(section.transforms) or not all(part.is_all for part in _parts(section))


def records_of_file(path: Path, section: DataLoaderSection, cache_dir: Path) -> Records:
    """The records of one file, for a section without steps, with the fields of column_map."""
    return map_columns(read_raw_records(path, section, cache_dir), section.column_map)


def records_of_files(files: list[DataFile], section: DataLoaderSection, cache_dir: Path) -> Records:
    """The records of all files after the slice of the split, the steps and column_map."""
    records: Records = chain.from_iterable(
        _records_of_part(part, files, section, cache_dir) for part in _parts(section)
    )
    for step in _steps(section):
        records = apply_transform(records, step)
    return map_columns(records, section.column_map)


def _records_of_part(
    part: SplitPart, files: list[DataFile], section: DataLoaderSection, cache_dir: Path
) -> Iterator[Record | UserError]:
    own = [file.path for file in files if file.split in ("", part.name)]

    def read() -> Iterator[Record | UserError]:
        return chain.from_iterable(read_raw_records(path, section, cache_dir) for path in own)

    if part.needs_count:
        yield from islice(read(), *part.bounds(sum(1 for _ in read())))
    else:
        yield from islice(read(), part.start, part.stop)


def _parts(section: DataLoaderSection) -> tuple[SplitPart, ...]:
    try:
        return parse_split(section.split)
    except WrongSplit as error:
        raise UserError(
            f"data_loader.split = {section.split!r}", rule=error.rule, nearest=error.nearest,
            advice="Fix the split",
        ) from None  # fmt: skip


def _steps(section: DataLoaderSection) -> Iterator[Transform]:
    for index, entry in enumerate(section.transforms or ()):
        step = parse_transform(entry)
        if isinstance(step, list):
            raise UserError(
                f"data_loader.transforms.{index}: {step[0].rule}",
                rule="every step is known and has its arguments",
                nearest=step[0].nearest, advice=step[0].advice or "Fix the step",
            )  # fmt: skip
        yield step


def without_null(record: Record) -> Record:
    """A record of a table without null values, which stand for fields that are not there."""
    return replace(record, value=_without_null(record.value)) if record.has_all_columns else record


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
