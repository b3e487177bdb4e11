"""Records of data files, each with its file and line, and reading JSON, JSON lines and Parquet.

`record_files` chooses the reader of a file; `tables` and `arrow_files` have the other ones.

Invariant: a record that cannot be read is an error with the file and, for JSON, the line. Nothing
is skipped or replaced silently. JSON values keep their type (a string that looks like a date stays
a string). Parquet is read with the `datasets` library, which is imported only when needed, does not
use the network, and streams (it makes no second copy of the data on disk).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from launcher.data.encoding import NotText, decode, lines_of_bytes, read_bytes, read_lines
from launcher.errors import Problem, UserError
from launcher.json_text import STRICT, NotJson, line_and_column, parse, parse_at, printable

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
JSON = (".json", ".json.gz")

MAX_PROBLEMS = 10
"""Wrong records that are reported together."""
READ_ON = 1000
"""Records that are checked after the first wrong one, to report others with it."""

_INSTALL = "Install it: pip install 'slipway[data]'"
_SPACE = re.compile(r"[ \t\r\n]*")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One record and where it was read (`data.jsonl:12`, or `data.json, record 12`)."""

    where: str
    value: dict[str, Any]
    has_all_columns: bool = False
    """Whether it is a row of a table: each row has every column of its file."""


def convert_records(
    records: Iterable[Record | UserError], convert: Callable[[Record], T]
) -> Iterator[T]:
    """`convert` every record.

    Raises UserError for the first that cannot be read or converted, together with others among the
    next `READ_ON`.
    """

    def converted(record: Record | UserError) -> T:
        if isinstance(record, UserError):
            raise record
        return convert(record)

    iterator = iter(records)
    for record in iterator:
        try:
            value = converted(record)
        except UserError as error:
            raise _with_following(error, iterator, converted) from error
        yield value


def _with_following(
    first: UserError,
    records: Iterator[Record | UserError],
    converted: Callable[[Record | UserError], Any],
) -> UserError:
    problems: list[Problem] = list(first.problems)
    following = islice(records, READ_ON)
    while len(problems) < MAX_PROBLEMS:
        try:
            converted(next(following))
        except StopIteration:
            break
        except UserError as error:
            problems += error.problems
    return UserError(problems)


def read_json_records(path: Path) -> Iterator[Record | UserError]:
    """The records of a JSON file (a list of objects, or lines) or a JSON-lines file.

    A wrong record is yielded as an error, and reading continues after it where it can. Raises
    UserError when the file cannot be read or has another structure.
    """
    lines = read_lines(path)
    if str(path).lower().endswith(JSON):
        text = _text_of(path)
        if text.lstrip().startswith("["):
            yield from _list_items(path, text)
            return
        _refuse_one_object(path, text)
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, line in lines:
        yield _of_line(path, number, line)


def records_of_lines(
    path: Path | str, lines: Iterable[bytes], first: int, offset: int
) -> Iterator[Record | UserError]:
    """The records of some lines of a file of JSON lines, as `read_json_records` gives them; the
    first line has the number `first` and begins at `offset` in bytes."""
    for number, line in lines_of_bytes(lines, first, offset):
        yield _of_line(path, number, line)


def read_parquet_records(path: Path, cache_dir: Path) -> Iterator[Record]:
    """The rows of a Parquet file, streaming; None for null.

    Raises UserError when the `datasets` library is missing or cannot read the file.
    """
    if path.stat().st_size == 0:
        return
    number = 0
    with _quiet_datasets() as datasets:
        try:
            if _is_empty_parquet(path):  # which `datasets` cannot read
                return
            rows = datasets.load_dataset(
                "parquet",
                data_files=[str(path.resolve())],
                split="train",
                streaming=True,
                cache_dir=str(cache_dir / "huggingface_datasets"),
            )
            for number, row in enumerate(rows, 1):
                yield Record(f"{path}, record {number}", row, has_all_columns=True)
        except UnicodeDecodeError as error:
            raise UserError(
                f"has a string that is not UTF-8 (byte 0x{error.object[error.start]:02x} "
                f"at its offset {error.start})",
                where=f"{path}, record {number + 1}",
                rule="a string of a Parquet file is UTF-8",
                advice="Fix the record, or encode its strings as UTF-8",
            ) from error
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"cannot be read as Parquet ({reason})",
                where=f"{path}, after record {number}" if number else str(path),
                rule="it is read with the `datasets` library, which must know its types",
                advice="Inspect it with pyarrow.parquet.read_table, and write it again",
            ) from error


def _is_empty_parquet(path: Path) -> bool:
    from pyarrow.parquet import read_metadata

    return bool(read_metadata(path).num_rows == 0)


def shown(value: Any) -> str:
    """A value for a message, shortened and with unprintable characters escaped."""
    return printable(_SHORT.repr(value))


_KINDS = {
    list: "a list",
    dict: "an object",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
    bytes: "bytes",
    Decimal: "a decimal number",
    datetime: "a date and time",
    date: "a date",
    time: "a time",
    timedelta: "a duration",
}


def kind_of(value: Any) -> str:
    """The type of a value in a record, for a message."""
    return _KINDS.get(type(value), type(value).__name__)


def _text_of(path: Path) -> str:
    try:
        return decode(read_bytes(path))
    except NotText as error:
        raise not_text(path, error) from error


def _refuse_one_object(path: Path, text: str) -> None:
    """Raise UserError where the file is one JSON object over several lines."""
    if "\n" not in text.strip():
        return
    try:
        parse(text)
    except NotJson:
        return
    raise UserError(
        "is one JSON object",
        where=str(path),
        rule="a JSON dataset is a list of objects, or has one object per line",
        advice="Put the records into a list",
    )


def _list_items(path: Path, text: str) -> Iterator[Record | UserError]:
    position = _skip_space(text, text.index("[") + 1)
    number = 0
    is_open = text[position : position + 1] != "]"
    while is_open:
        number += 1
        where = f"{path}, record {number}"
        try:
            value, end = parse_at(text, position, STRICT)
            end = _skip_space(text, end)
            is_open = text[end : end + 1] == ","
            if not is_open and text[end : end + 1] != "]":
                raise NotJson("Expecting ',' delimiter", end)
        except NotJson as error:
            yield _not_json_item(path, number, text, position, error)
            return
        yield _record(where, value)
        position = _skip_space(text, end + 1) if is_open else end
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        yield _not_json_item(path, number, text, rest, NotJson("Extra data", rest))


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _not_json_item(path: Path, number: int, text: str, begin: int, error: NotJson) -> UserError:
    """The error for a record of a list; without a position it is that of the record's beginning."""
    at = error.position
    line, column = line_and_column(text, begin if at is None else at)
    start = begin if at is None else text.rfind("\n", 0, at) + 1
    here = text[start:].partition("\n")[0]
    place = None if at is None else column
    return _not_json(f"{path}:{line}", error.reason, place, here, f"It is in record {number}")


def _of_line(path: Path | str, number: int, line: str | NotText) -> Record | UserError:
    if isinstance(line, NotText):
        return not_text(path, line)
    where = f"{path}:{number}"
    try:
        value = parse(line.rstrip("\r\n"), STRICT)
    except NotJson as error:
        column = None if error.position is None else error.position + 1
        return _not_json(where, error.reason, column, line)
    return _record(where, value)


def _not_json(
    where: str, reason: str, column: int | None, line: str, nearest: str = ""
) -> UserError:
    place = "" if column is None else f", column {column}"
    return UserError(
        f"is not JSON ({reason}{place}): {_excerpt(line)}",
        where=where,
        rule="every record must be one JSON object",
        nearest=nearest,
        advice="Fix or remove the line",
    )


def not_text(path: Path | str, error: NotText, what: str = "is not JSON") -> UserError:
    """The error for bytes of a data file that cannot be decoded."""
    return UserError(
        f"{what} (not {error.encoding}, column {error.column}): {_excerpt(error.excerpt)}",
        where=f"{path}:{error.line}",
        rule="data files are UTF-8, or UTF-16 or UTF-32 with a byte order mark",
        nearest=f"The byte is at offset {error.offset} of the file",
        advice="Convert the file (iconv -f LATIN1 -t UTF-8), or fix the line",
    )


def _record(where: str, value: Any) -> Record | UserError:
    if isinstance(value, dict):
        return Record(where, value)
    try:
        text = json.dumps(value)
    except RecursionError:
        text = shown(value)
    return UserError(
        f"is {kind_of(value)}: {_excerpt(text)}",
        where=where,
        rule="every record must be a JSON object",
        advice='Write it as {"text": ...}, or in the format of your data_loader.format',
    )


def _excerpt(text: str) -> str:
    text = printable(text[:200]).strip()
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The `datasets` module without network requests and without log lines for errors that are
    raised here."""
    try:
        import datasets
        from datasets import config
        from datasets.utils import logging
    except ImportError as error:
        raise UserError(
            "the `datasets` library is not installed",
            rule="Parquet files are read with it",
            advice=_INSTALL,
        ) from error
    verbosity, counts = logging.get_verbosity(), config.HF_UPDATE_DOWNLOAD_COUNTS
    logging.set_verbosity(logging.CRITICAL)
    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it sends a request for every file
    try:
        yield datasets
    finally:
        logging.set_verbosity(verbosity)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
