"""The tokens of every row of MindRecord files, for tools that write them in another format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.errors import UserError
from launcher.mindspore.mindrecord.columns import column_problem
from launcher.mindspore.mindrecord.files import find_records
from launcher.mindspore.mindrecord.reader import FileReader
from launcher.mindspore.mindrecord.walk import Ints


def token_arrays(places: Sequence[str], name: str) -> Iterator[Ints]:
    """The column `name` of every row (int64 [tokens]) in order, one row after another in memory.

    places: files with their families, folders or globs. Raises UserError for files that cannot be
    read, and for a column that is not one of integers, by the option of a tool that names it.
    """
    headers = find_records(places).headers
    if problem := column_problem("input_ids", name, headers[0], option="--column"):
        raise UserError([problem])
    for header in headers:
        file = FileReader(header)
        for group in header.groups:
            offsets = file.offsets(group)[:-1].tolist()
            for row, offset in enumerate(offsets, start=group.first_row):
                yield file.integers(file.part(file.row_at(offset), name, row), name, row)
            file.release(group)
