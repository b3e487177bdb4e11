"""HFDataLoader: each record of a JSON, JSON-lines or Parquet file is a document, its text in one
column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from launcher.config.schema import DataLoaderSection
from launcher.data.files import DataFile, find_files
from launcher.data.loaders.base import DataLoader, Document, FromRecords
from launcher.data.loaders.text import tokenize_texts, without_empty
from launcher.data.records import (
    RECORD_SUFFIXES,
    Record,
    convert_records,
    is_parquet,
    kind_of,
    read_json_records,
    read_parquet_records,
    shown,
)
from launcher.data.strictness import names_of, surrogate_error
from launcher.data.tally import Tally
from launcher.errors import UserError, did_you_mean
from launcher.json_text import lone_surrogate, printable


class Found(Protocol):
    """A file as it was found."""

    @property
    def below(self) -> str:
        """Its path relative to the folder it was found in; empty for a file that is named."""
        ...


FoundT = TypeVar("FoundT", bound=Found)

_SPLITS = {"train", "validation", "valid", "dev", "test", "eval"}


def find_record_files(section: DataLoaderSection) -> list[DataFile]:
    """The files with records that a section names, of its split."""
    advice = "Text files are read by TextDataLoader"
    return of_split(find_files(section.paths, RECORD_SUFFIXES, suffix_advice=advice), section)


def _read_file(
    path: Path, section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Document]:
    records: Iterable[Record | UserError]
    records = read_parquet_records(path, cache_dir) if is_parquet(path) else read_json_records(path)
    return _documents(records, section, tally, None)


def _documents(
    records: Iterable[Record | UserError],
    section: DataLoaderSection,
    tally: Tally,
    first: Record | None,
) -> Iterator[Document]:
    """The documents of consecutive records of a file, whose first record is `first`; None: it is
    among them."""
    column = section.text_column or "text"
    is_first = first is None
    if first is not None:
        _text_of(first, column, first=True)

    def document_of(record: Record) -> Document | None:
        nonlocal is_first
        begins, is_first = is_first, False
        text = _text_of(record, column, first=begins)
        if text is None:
            tally.records_without_text.add(record.where)
            return None
        return Document(record.where, text)

    found = convert_records(records, document_of)
    yield from without_empty((document for document in found if document is not None), tally)


def _text_of(record: Record, column: str, *, first: bool) -> str | None:
    """The text of a record, None where it has none; the first record of a file must have one."""
    row = record.value
    if column not in row:
        if not first:
            return None
        near = printable(did_you_mean(column, row))
        raise UserError(
            f"there is no column {column!r}",
            where=record.where,
            rule="HFDataLoader reads its documents from data_loader.text_column",
            nearest=near or f"Columns found: {names_of(row)}",
            advice=f"Columns found: {names_of(row)}" if near else "",
        )
    value = row[column]
    if value is None:
        return None
    if not isinstance(value, str):
        texts = {name: text for name, text in row.items() if isinstance(text, str)}
        raise UserError(
            f"column {column!r} = {shown(value)}{_not_of_json(value)}",
            where=record.where,
            rule="a document must be a string",
            nearest=f"Columns with text: {names_of(texts)}" if texts else "",
            advice="Set data_loader.text_column",
        )
    if wrong := lone_surrogate(value):
        raise surrogate_error(record.where, column, wrong)
    return value


def _not_of_json(value: Any) -> str:
    """The type of a Parquet value, where its text does not show it (a date looks like a string)."""
    return "" if isinstance(value, (int, float, list, dict)) else f", which is {kind_of(value)}"


def of_split(files: list[FoundT], section: DataLoaderSection) -> list[FoundT]:
    """The files of one split, by the rule of the Hugging Face hub: the split is a word in their
    name. Files that the user names are always taken; without any split in a name all is `train`."""
    split = section.split
    names = [set(re.split(r"[^a-zA-Z0-9]+", file.below.lower())) for file in files]
    found = set().union(*names) & (_SPLITS | {split})
    if split == "train" and not found:
        return files
    chosen = [
        file for file, name in zip(files, names, strict=True) if not file.below or split in name
    ]
    if chosen:
        return chosen
    raise UserError(
        f"data_loader.split = {split!r}: none of {len(files)} file(s) has it in its name",
        rule="a file in a folder belongs to the split that is a word of its name",
        nearest=f"Splits found: {', '.join(sorted(found)) or 'none'}",
        advice="Give one of these splits, or name the files in data_loader.dataset_files",
    )


TEXT_COLUMN_LOADER = DataLoader(
    find_files=find_record_files,
    read_file=_read_file,
    tokenize=tokenize_texts,
    from_records=FromRecords(samples=_documents, column=lambda section: section.text_column),
)
