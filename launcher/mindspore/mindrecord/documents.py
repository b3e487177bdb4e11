"""The tokens of every row of MindRecord files, for tools that write them in another format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.mindspore.mindrecord.columns import choose_columns
from launcher.mindspore.mindrecord.files import find_records
from launcher.mindspore.mindrecord.reader import FileReader
from launcher.mindspore.mindrecord.walk import Ints


def token_arrays(places: Sequence[str], column: str | None = None) -> Iterator[Ints]:
    """The column of every row (int64 [tokens]) in order, one row after another in memory.

    places: files with their families, folders or globs. column: left out, `input_ids`. Raises
    UserError for files that cannot be read, and for a column that is not one of integers.
    """
    headers = find_records(places).headers
    written = None if column is None else {"input_ids": column}
    name = choose_columns(written, headers[0]).input_ids
    for header in headers:
        file = FileReader(header)
        for group in header.groups:
            offsets = file.offsets(group)[:-1].tolist()
            for row, offset in enumerate(offsets, start=group.first_row):
                yield file.integers(file.part(file.row_at(offset), name, row), name, row)
            file.release(group)
