"""Reading records (JSON, JSON lines, Parquet) from files, each with the place it came from.

Invariant: a record that cannot be read is an error that names the file and, for JSON lines, the
line. Nothing is skipped in silence. Parquet, and JSON for `HFDataLoader`, go through the `datasets`
library, which is imported only when it is needed, never asks the network, and streams (it makes no
second copy of the data on the disk).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.data.files import unreadable
from launcher.errors import UserError

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
JSON = (".json", ".json.gz")
PARQUET = (".parquet",)
RECORD_SUFFIXES = (*JSON_LINES, *JSON, *PARQUET)

_INSTALL = "Install it: pip install 'slipway[data]'"


@dataclass(frozen=True)
class Record:
    """One record and where it stands (`data.jsonl:12`, or `data.json, record 12`)."""

    where: str
    value: dict[str, Any]


def read_json_records(path: Path) -> Iterator[Record]:
    """The records of a JSON file (a list of objects, or lines) or a JSON-lines file."""
    if str(path).lower().endswith(JSON):
        text = _read_text(path)
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip().startswith("["):
                here = text.splitlines()[error.lineno - 1 :][:1]
                raise _not_json(path, error.lineno, error, here) from error
            # otherwise lines of JSON in a .json file, or a mistake that the lines will show
        else:
            if isinstance(content, list):
                for number, value in enumerate(content, 1):
                    yield _record(f"{path}, record {number}", value)
                return
            if "\n" in text.strip():  # one object, over several lines
                raise UserError(
                    "holds one object",
                    where=str(path),
                    rule="a JSON dataset is a list of objects, or one object a line",
                    advice="Put the records into a list",
                )
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _not_json(path, number, error, [line]) from error
        yield _record(where, value)


def read_records(path: Path, cache_dir: Path) -> Iterator[Record]:
    """The records of a JSON, JSON-lines or Parquet file, by its suffix."""
    if str(path).lower().endswith(PARQUET):
        for number, row in enumerate(stream_rows(path, cache_dir), 1):
            yield _record(f"{path}, record {number}", row)
    else:
        yield from read_json_records(path)


def stream_rows(path: Path, cache_dir: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file as the `datasets` library reads them, streaming.

    Raises UserError when the library is missing or cannot read a Parquet file; errors of the
    library on JSON come through, for the caller to look for the reason.
    """
    builder = "parquet" if str(path).lower().endswith(PARQUET) else "json"
    if path.stat().st_size == 0:
        return
    with _quiet_datasets() as datasets:
        try:
            rows = datasets.load_dataset(
                builder,
                data_files=[str(path.resolve())],
                split="train",
                streaming=True,
                cache_dir=str(cache_dir / "huggingface_datasets"),
            )
            yield from rows
        except Exception as error:
            if builder == "json":
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"cannot be read as Parquet ({reason})",
                where=str(path),
                rule="a file ending in .parquet must be one",
                advice="Look at it with pyarrow.parquet.read_table, and write it anew",
            ) from error


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The `datasets` module, kept from the network and from logging what we report ourselves."""
    try:
        import datasets
        from datasets import config
        from datasets.utils import logging
    except ImportError as error:
        raise UserError(
            "the `datasets` library is not installed",
            rule="HFDataLoader and Parquet files are read through it",
            advice=_INSTALL,
        ) from error
    verbosity, counts = logging.get_verbosity(), config.HF_UPDATE_DOWNLOAD_COUNTS
    logging.set_verbosity(logging.CRITICAL)
    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a request to a server for every file
    try:
        yield datasets
    finally:
        logging.set_verbosity(verbosity)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def _not_json(
    path: Path,
    number: int,
    error: json.JSONDecodeError | UnicodeDecodeError,
    line: Sequence[str | bytes],
) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        reason, column = error.msg, error.colno
    else:
        reason, column = "not UTF-8", error.start + 1
    return UserError(
        f"is not JSON ({reason}, column {column}): {_excerpt(line[0] if line else '')}",
        where=f"{path}:{number}",
        rule="every record must be one JSON object",
        advice="Repair the line or take it out",
    )


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(
            f"is {_kind(value)}: {_excerpt(json.dumps(value))}",
            where=where,
            rule="every record must be a JSON object",
            advice='Write it as {"text": ...}, or the form that your data_loader.format has',
        )
    return Record(where, value)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _read_text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise unreadable(path, error) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError) as error:
        raise unreadable(path, OSError(str(error))) from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _excerpt(text: str | bytes) -> str:
    text = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
    text = text.strip()
    return text if len(text) <= 60 else text[:57] + "..."
