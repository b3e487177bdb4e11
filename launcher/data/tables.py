"""Rows of CSV and TSV files as records; lines of text files as records with the column `text`.

Owns these formats (RFC 4180: a quoted field may hold separators, line breaks, and quotes that are
doubled). Invariants: values are strings as they were written, an empty field is an empty string; a
row whose number of fields is not that of the header is an error with its line, never padded.
"""

from __future__ import annotations

import csv
import io
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from launcher.data.encoding import NotText, decode, encoding_of, open_file, read_bytes, read_lines
from launcher.data.files import unreadable
from launcher.data.records import Record, not_text
from launcher.errors import UserError
from launcher.json_text import printable

_SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}


def read_text_records(path: Path) -> Iterator[Record | UserError]:
    """The lines of a text file that are not blank, as `{"text": line}`."""
    for number, line in read_lines(path):
        if isinstance(line, NotText):
            yield not_text(path, line, "is not text")
        else:
            yield Record(f"{path}:{number}", {"text": line.rstrip("\r\n")}, has_all_columns=True)


def read_table_records(path: Path, separator: str) -> Iterator[Record | UserError]:
    """The rows of a table whose first row has the names of the columns.

    A row of another length is yielded as an error, and reading continues after it; after wrong
    quoting it ends, since where the next row begins is not known. Raises UserError when the file
    cannot be read, is not text, or has no usable header.
    """
    try:
        with open_file(path) as file:
            encoding = encoding_of(file.read(4))
            file.seek(0)
            name = "utf-8-sig" if encoding == "utf-8" else encoding
            with io.TextIOWrapper(file, encoding=name, newline="") as text:
                yield from _rows(path, text, separator)
    except UnicodeDecodeError:
        try:
            decode(read_bytes(path))
        except NotText as error:
            raise not_text(path, error, f"is not {_kind(separator)}") from error
        raise
    except (OSError, EOFError, zlib.error) as error:
        failed = error if isinstance(error, OSError) else OSError(str(error))
        raise unreadable(path, failed) from error


def _rows(path: Path, text: io.TextIOWrapper, separator: str) -> Iterator[Record | UserError]:
    csv.field_size_limit(sys.maxsize)  # the default refuses documents of more than 128 KiB
    reader = csv.reader(text, delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield _wrong_quoting(path, first, reader.line_num, separator, error)
            return
        if row is None:
            return
        where = f"{path}:{first}"
        if not row:
            continue  # a blank line
        if header is None:
            header = _header(where, row, separator)
        elif len(row) == len(header):
            yield Record(where, dict(zip(header, row, strict=True)), has_all_columns=True)
        else:
            yield _wrong_length(where, row, header, separator)


def _header(where: str, row: list[str], separator: str) -> list[str]:
    names = [name.strip() for name in row]
    repeated = [name for name, count in Counter(names).items() if count > 1 or not name]
    if repeated:
        raise UserError(
            f"the header has the column {printable(repeated[0])!r} {names.count(repeated[0])} times"
            if repeated[0]
            else f"column {names.index('') + 1} of the header has no name",
            where=where,
            rule=f"the first row of {_kind(separator)} names each column once",
            nearest=f"Columns found: {printable(', '.join(names)[:200])}",
            advice="Fix the header",
        )
    return names


def delimiter_advice(columns: Collection[str]) -> str:
    """Advice where the only column of a table looks like a header with another separator."""
    name = next(iter(columns)) if len(columns) == 1 else ""
    sign = next((sign for sign in _SEPARATORS if sign in name), "")
    seems = f"The header looks as if it was separated by {_SEPARATORS[sign]}" if sign else ""
    return f'{seems}: set data_loader.delimiter: "{printable(sign)}"' if sign else ""


def _wrong_length(where: str, row: list[str], header: list[str], separator: str) -> UserError:
    other = next((sign for sign in _SEPARATORS if sign != separator and sign in header[0]), "")
    hint = f"; the header looks as if it was separated by {_SEPARATORS[other]}" if other else ""
    fix = f'Set data_loader.delimiter: "{other}"' if other else "Quote fields with separators"
    return UserError(
        f"has {len(row)} field(s): {printable(separator.join(row)[:60])!r}",
        where=where,
        rule=f"a row has as many fields as the header, {len(header)}{hint}",
        nearest=f"Columns: {printable(', '.join(header)[:200])}",
        advice=f"{fix}, or fix the row",
    )


def _wrong_quoting(
    path: Path, first: int, last: int, separator: str, error: csv.Error
) -> UserError:
    reason = str(error)
    if "unexpected end of data" in reason:
        reason = f"a quoted field is not closed before the end of the file, line {last}"
    elif "expected after" in reason:
        reason = f"line {last} has text after the closing quote of a field"
    return UserError(
        f"is not {_kind(separator)} ({reason})",
        where=f"{path}:{first}",
        rule='a field with quotes, separators or line breaks is quoted, its quotes doubled ("")',
        advice="Fix the row, or write the table again with a CSV library",
    )


def _kind(separator: str) -> str:
    return "TSV" if separator == "\t" else "CSV"
