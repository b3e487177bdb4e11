"""HFDataLoader: each record of a JSON, JSON-lines, CSV, Parquet or Arrow file is a document, its
text in one column; each line of a text file is one where `path: text` is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.config.schema import DataLoaderSection
from launcher.data.files import DataFile
from launcher.data.loaders.base import DataLoader, Document, FromRecords
from launcher.data.loaders.text import tokenize_texts, without_empty
from launcher.data.record_files import find_record_files, records_of_file, records_of_files
from launcher.data.records import Record, convert_records, kind_of, shown
from launcher.data.strictness import names_of, surrogate_error
from launcher.data.tables import delimiter_advice
from launcher.data.tally import Tally
from launcher.errors import UserError, did_you_mean
from launcher.json_text import lone_surrogate, printable


def _read_file(
    path: Path, section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Document]:
    yield from _documents(records_of_file(path, section, cache_dir), section, tally)


def _read_files(
    files: list[DataFile], section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Document]:
    yield from _documents(records_of_files(files, section, cache_dir), section, tally)


def _documents(
    records: Iterable[Record | UserError],
    section: DataLoaderSection,
    tally: Tally,
    first_record: Record | None = None,
) -> Iterator[Document]:
    """The documents of records, the first of which must have the text column; `first_record`: the
    first one of their file, where it is not among them."""
    column = "text" if "text" in (section.column_map or {}) else section.text_column or "text"
    is_first = first_record is None
    if first_record is not None:
        _text_of(first_record, column, first=True)

    def document_of(record: Record) -> Document | None:
        nonlocal is_first
        first, is_first = is_first, False
        text = _text_of(record, column, first=first)
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
        if isinstance(row.get("input_ids"), list):
            raise UserError(
                f"there is no column {column!r}, but tokens: the columns are {names_of(row)}",
                where=record.where,
                rule="HFDataLoader reads text; records that were tokenized are not read",
                nearest="Nearest: the records before they were tokenized",
                advice="Give those: they are tokenized once, and cached",
            )
        near = printable(did_you_mean(column, row))
        raise UserError(
            f"there is no column {column!r}",
            where=record.where,
            rule="HFDataLoader reads its documents from data_loader.text_column",
            nearest=near or f"Columns found: {names_of(row)}",
            advice=delimiter_advice(row) or (f"Columns found: {names_of(row)}" if near else ""),
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


TEXT_COLUMN_LOADER = DataLoader(
    find_files=find_record_files,
    read_file=_read_file,
    read_files=_read_files,
    tokenize=tokenize_texts,
    from_records=FromRecords(samples=_documents, column=lambda section: section.text_column),
)
