"""Documents and conversations: what the data loaders of a configuration read.

Owns the meaning of `data_loader` (`TextDataLoader`, `HFDataLoader`, `InstructionDataLoader`):
which files, in which order, and what of each file is a document or a conversation. Invariant:
what is left out or repaired is counted in a `Tally`; everything else is an error that says where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from launcher.config.schema import DataLoaderSection
from launcher.data.conversations import Conversation, conversations_of_file
from launcher.data.encoding import NotText, decode, encoding_of, read_bytes
from launcher.data.files import DataFile, find_files
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
from launcher.data.strictness import Strictness, names_of, surrogate_error
from launcher.data.tally import Tally
from launcher.errors import UserError, did_you_mean
from launcher.json_text import lone_surrogate, printable

TEXT = "TextDataLoader"
HUGGING_FACE = "HFDataLoader"
INSTRUCTION = "InstructionDataLoader"
_OTHER_SPELLINGS = {"CommonDataLoader": HUGGING_FACE}

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".log"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala"),
    *(
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".swift",
        ".cs",
        ".lua",
        ".jl",
        ".r",
        ".sql",
        ".sh",
    ),
)
"""What a TextDataLoader takes from a folder: prose and source code; no tables, no web pages."""
_SPLITS = {"train", "validation", "valid", "dev", "test", "eval"}


class Document(NamedTuple):
    """One text and where it stands."""

    where: str
    text: str


def loader_type(loader: DataLoaderSection) -> str:
    """The type of the data loader, other spellings folded."""
    return _OTHER_SPELLINGS.get(loader.type, loader.type)


def source_files(loader: DataLoaderSection) -> list[DataFile]:
    """The files of a data loader; raises UserError when a place is absent or holds none."""
    kind, places = loader_type(loader), loader.paths
    if not places:
        wanted = "dataset_files" if kind == INSTRUCTION else "dataset_dir"
        raise UserError(
            f"data_loader.{wanted} is not set",
            rule=f"{kind} needs to know which files to read",
            advice="Give a file, a folder or a glob",
        )
    if kind == TEXT:
        return find_files(
            places,
            ["." + suffix.lstrip("*.") for suffix in loader.suffixes or TEXT_SUFFIXES],
            suffixes_apply_to_globs=bool(loader.suffixes),
            suffix_advice="Set data_loader.suffixes, or the data_loader.type that reads these",
        )
    files = find_files(
        places, RECORD_SUFFIXES, suffix_advice="Text files are read by TextDataLoader"
    )
    return _of_split(files, loader.split)


def documents(
    loader: DataLoaderSection, files: Iterable[DataFile], cache_dir: Path, tally: Tally
) -> Iterator[Document]:
    """The texts of a TextDataLoader or an HFDataLoader, at most `num_samples`; no empty ones."""
    if loader_type(loader) == TEXT:
        found = (_text_file(file.path, tally) for file in files)
    else:
        column = loader.text_column or "text"
        found = (
            document
            for file in files
            for document in _text_column(file.path, column, cache_dir, tally)
        )
    for document in islice(_without_empty(found, tally), loader.num_samples):
        tally.documents += 1
        yield document


def conversations(
    loader: DataLoaderSection, files: Iterable[DataFile], cache_dir: Path, tally: Tally
) -> Iterator[Conversation]:
    """The conversations of an InstructionDataLoader, at most `num_samples`.

    The format is `data_loader.format`, else what the first record of each file looks like.
    """
    strictness = Strictness(strict=loader.strict_fields, tally=tally)
    found = (
        conversation
        for file in files
        for conversation in conversations_of_file(file.path, loader.format, cache_dir, strictness)
    )
    for conversation in islice(found, loader.num_samples):
        tally.documents += 1
        yield conversation


def _without_empty(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    for document in documents:
        if document.text.strip():
            yield document
        else:
            tally.empty_documents += 1


def _text_file(path: Path, tally: Tally) -> Document:
    content = read_bytes(path)
    try:
        text = decode(content)
    except NotText as error:
        text = content.decode(encoding_of(content), errors="replace").removeprefix("\ufeff")
        tally.undecodable_files.add(f"{path} (line {error.line}, offset {error.offset})")
        tally.replaced_characters += text.count("\ufffd") - content.count(b"\xef\xbf\xbd")
    if "\0" in text:
        tally.files_with_null.add(str(path))
    return Document(str(path), text)


def _text_column(path: Path, column: str, cache_dir: Path, tally: Tally) -> Iterator[Document]:
    records: Iterable[Record | UserError]
    records = read_parquet_records(path, cache_dir) if is_parquet(path) else read_json_records(path)
    is_first = True

    def document_of(record: Record) -> Document | None:
        nonlocal is_first
        first, is_first = is_first, False
        text = _text_of(record, column, first=first)
        if text is None:
            tally.records_without_text.add(record.where)
            return None
        return Document(record.where, text)

    found = convert_records(records, document_of)
    yield from (document for document in found if document is not None)


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
    """What a value of Parquet is whose notation does not show it (a date is not its text)."""
    return "" if isinstance(value, (int, float, list, dict)) else f", which is {kind_of(value)}"


def _of_split(files: list[DataFile], split: str) -> list[DataFile]:
    """Of the files found in folders those of one split, by the rule of the Hugging Face hub: its
    name is a word of theirs. Where no name has a split in it, everything is `train`."""
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
        f"data_loader.split = {split!r} is in the name of none of {len(files)} file(s)",
        rule="a file in a folder belongs to the split that is a word of its name",
        nearest=f"Splits found: {', '.join(sorted(found)) or 'none'}",
        advice="Name a split that is there, or the files themselves in data_loader.dataset_files",
    )
