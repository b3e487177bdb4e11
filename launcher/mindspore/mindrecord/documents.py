"""The tokens of every row of MindRecord files, for tools that write them in another format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.data.loaders.base import Log
from launcher.data.progress import active_meter
from launcher.errors import UserError
from launcher.mindspore.mindrecord.columns import column_problem
from launcher.mindspore.mindrecord.files import find_records
from launcher.mindspore.mindrecord.index import check_tokens
from launcher.mindspore.mindrecord.reader import FileReader
from launcher.mindspore.mindrecord.walk import Ints


def token_arrays(places: Sequence[str], name: str, log: Log) -> Iterator[Ints]:
    """The column `name` of every row (int64 [tokens]) in order, one row after another in memory.

    places: files with their families, folders or globs. log: for a line about other columns.
    Raises UserError for files that cannot be read, a column that is not one of integers, by the
    option of a tool that names it, and values that are no tokens.
    """
    found = find_records(places)
    headers = found.headers
    if problem := column_problem("input_ids", name, headers[0], option="--column"):
        raise UserError([problem])
    if others := [other for other in headers[0].by_name if other != name]:
        log(f"note: of each row only {name} is written; not used: {', '.join(others)}")
    for note in found.notes:
        log(note)
    for header in headers:
        file = FileReader(header)
        for group in header.groups:
            offsets = file.offsets(group)[:-1].tolist()
            for row, offset in enumerate(offsets, start=group.first_row):
                tokens = file.integers(file.part(file.row_at(offset), name, row), name, row)
                check_tokens(file, row, tokens, f"Choose the column of the tokens, not {name}")
                yield tokens
            file.release(group)
            if meter := active_meter():
                meter.add(group.blob[1] - group.blob[0])
