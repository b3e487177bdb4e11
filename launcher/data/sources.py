"""Documents and conversations: what the data loaders of a configuration read.

Owns the meaning of `data_loader` (`TextDataLoader`, `HFDataLoader`, `InstructionDataLoader`):
which files, in which order, and what of each file is a document or a conversation. Invariant:
what is left out or repaired is counted in a `Tally`; everything else is an error that says where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.config.schema import DataLoaderSection
from launcher.data.conversations import Conversation, conversations_of_file
from launcher.data.files import DataFile, find_files, unreadable
from launcher.data.records import RECORD_SUFFIXES, read_json_records, stream_rows
from launcher.errors import UserError, did_you_mean

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


@dataclass(kw_only=True)
class Tally:
    """What was read, and what was left out or repaired on the way."""

    documents: int = 0
    empty_documents: int = 0
    records_without_text: list[str] = field(default_factory=list)
    """Places of records whose text column is absent or null."""
    undecodable_files: list[str] = field(default_factory=list)
    replaced_characters: int = 0

    def warnings(self) -> list[str]:
        """One line for each thing a user should know of."""
        lines = []
        if self.undecodable_files:
            lines.append(
                f"warning: {len(self.undecodable_files)} file(s) are not valid UTF-8: "
                f"{self.replaced_characters} character(s) were replaced by U+FFFD; "
                f"the first file is {self.undecodable_files[0]}"
            )
        if self.records_without_text:
            lines.append(
                f"warning: {len(self.records_without_text)} record(s) have no text in the text "
                f"column and were left out; the first is {self.records_without_text[0]}"
            )
        if self.empty_documents:
            lines.append(f"note: {self.empty_documents} empty document(s) were left out")
        return lines


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
) -> Iterator[str]:
    """The texts of a TextDataLoader or an HFDataLoader, at most `num_samples`; no empty ones."""
    if loader_type(loader) == TEXT:
        texts = (text for file in files for text in _text_file(file.path, tally))
    else:
        column = loader.text_column or "text"
        texts = (
            text for file in files for text in _text_column(file.path, column, cache_dir, tally)
        )
    for text in islice(_without_empty(texts, tally), loader.num_samples):
        tally.documents += 1
        yield text


def conversations(
    loader: DataLoaderSection, files: Iterable[DataFile], cache_dir: Path, tally: Tally
) -> Iterator[Conversation]:
    """The conversations of an InstructionDataLoader, at most `num_samples`.

    The format is `data_loader.format`, else what the first record of each file looks like.
    """
    records = (
        conversation
        for file in files
        for conversation in conversations_of_file(file.path, loader.format, cache_dir)
    )
    for conversation in islice(records, loader.num_samples):
        tally.documents += 1
        yield conversation


def _without_empty(texts: Iterable[str], tally: Tally) -> Iterator[str]:
    for text in texts:
        if text.strip():
            yield text
        else:
            tally.empty_documents += 1


def _text_file(path: Path, tally: Tally) -> Iterator[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("utf-8", errors="replace")
        tally.undecodable_files.append(str(path))
        tally.replaced_characters += text.count("\ufffd") - content.count(b"\xef\xbf\xbd")
        yield text


def _text_column(path: Path, column: str, cache_dir: Path, tally: Tally) -> Iterator[str]:
    count = 0

    def texts(row: Mapping[str, Any], where: str) -> Iterator[str]:
        text = _text_of(row, column, where, first=count == 0)
        if text is None:
            tally.records_without_text.append(where)
        else:
            yield text

    try:
        for row in stream_rows(path, cache_dir):
            yield from texts(row, f"{path}, record {count + 1}")
            count += 1
    except UserError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception:
        # The library gives up on a whole file and does not say where. Either a line is broken, and
        # reading line by line names it, or columns we do not need change their type on the way.
        for record in islice(read_json_records(path), count, None):
            yield from texts(record.value, record.where)
            count += 1


def _text_of(row: Mapping[str, Any], column: str, where: str, *, first: bool) -> str | None:
    """The text of a record, None where it has none; the first record of a file must have one."""
    if column not in row:
        if not first:
            return None
        raise UserError(
            f"there is no column {column!r}",
            where=where,
            rule="HFDataLoader reads its documents from data_loader.text_column",
            nearest=did_you_mean(column, row) or f"Columns found: {', '.join(row) or 'none'}",
            advice=f"Columns found: {', '.join(row)}" if did_you_mean(column, row) else "",
        )
    value = row[column]
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(
            f"column {column!r} = {value!r}",
            where=where,
            rule="a document must be a string",
            nearest="Columns with text: " + ", ".join(n for n in row if isinstance(row[n], str))
            if any(isinstance(other, str) for other in row.values())
            else "",
            advice="Set data_loader.text_column",
        )
    return value


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
