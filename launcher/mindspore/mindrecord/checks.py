"""What the check of a configuration asks of MindRecord files, before anything heavy is imported.

Owns the problems that headers and the first row show: files that are missing or damaged, columns
that do not exist, rows that are longer than seq_length. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.checks.check import Check
from launcher.config.provenance import KeyProblem
from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.errors import Problem, UserError
from launcher.mindspore.mindrecord.columns import Columns, choose_columns
from launcher.mindspore.mindrecord.files import find_records
from launcher.mindspore.mindrecord.header import LENGTH_BYTES, NUMBERS, Header
from models.positions import row_length


def check_loader(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    """The problems of a loader, `prefix` its key."""
    name = prefix.partition(".")[0]
    section, spec = check.value(name), check.spec
    length = section.seq_length
    if length is None and spec is not None:
        length = spec.seq_length or row_length(spec.family, spec.hf_config)
    for inner, problem in problems(loader, section, length):
        place = f"{name}.{inner}" if inner in ("seq_length", "packing") else f"{prefix}.{inner}"
        what = f"{problem.where}: {problem.what}" if problem.where else problem.what
        yield check.wrong(
            place, problem.rule, what=what, nearest=problem.nearest, advice=problem.advice,
            also=(f"{prefix}.type",),
        )  # fmt: skip


def problems(
    loader: DataLoaderSection, section: DatasetSection, seq_length: int | None
) -> Iterator[tuple[str, Problem]]:
    """Pairs of the key, in the loader or the data section, and its problem."""
    if section.packing and not isinstance(section.data_loader, list):
        yield (
            "packing",
            Problem(
                what="packing = True with MindDataset",
                rule="the rows of MindRecord files are read as they are",
                advice="Remove it; data_loader.eod_token_id keeps the documents of a row apart",
            ),
        )
    key = "dataset_dir" if loader.dataset_dir else "dataset_files"
    if any("://" in path for path in loader.paths):  # a URL, which is refused by another rule
        return
    try:
        is_list = not isinstance(loader.dataset_files, str | None)
        headers = find_records(loader.paths, is_list=is_list).headers
    except UserError as error:
        yield from ((key, problem) for problem in error.problems)
        return
    try:
        columns = choose_columns(loader.column_map, headers[0])
    except UserError as error:
        yield from (("column_map", problem) for problem in error.problems)
        return
    if not any(header.rows for header in headers):
        yield (
            key,
            Problem(
                what="the files have no rows",
                where=str(headers[0].path),
                rule="a data set has a row",
            ),
        )
    elif seq_length is not None:
        yield from _too_long(loader, headers[0], columns, seq_length)


def _too_long(
    loader: DataLoaderSection, header: Header, columns: Columns, seq_length: int
) -> Iterator[tuple[str, Problem]]:
    """The first row of a file is longer than rows may be."""
    length = first_length(header, columns.input_ids)
    shifted = columns.labels is not None and loader.labels == "shifted"
    if length is None or length <= seq_length + (not shifted):
        return
    other = ""
    if shifted and length == seq_length + 1:
        other = ", or data_loader.labels: unshifted where labels[t] is input_ids[t]"
    last = "" if shifted else ", the last of which is only predicted"
    yield (
        "seq_length",
        Problem(
            what=f"its first row has {length} tokens, and seq_length is {seq_length}",
            where=str(header.path),
            rule=f"rows are never cut: a row has at most {seq_length + (not shifted)} tokens{last}",
            nearest=f"Set train_dataset.seq_length: {length - (not shifted)}{other}",
        ),
    )


def first_length(header: Header, name: str) -> int | None:
    """Numbers in the column `name` of the first row; None where the row cannot be read."""
    field = header.by_name[name]
    group = next((group for group in header.groups if group.rows), None)
    if group is None:
        return None
    with header.path.open("rb") as file:
        file.seek(group.blob[0])
        room = _number(file.read(LENGTH_BYTES))
        if group.blob[0] + LENGTH_BYTES + room > group.blob[1]:
            return None
        length = room
        if len(header.blob_fields) > 1:
            for other in header.blob_fields:
                length = int.from_bytes(file.read(LENGTH_BYTES), "big")
                if length > room:
                    return None
                if other == name:
                    break
                file.seek(length, 1)
        if not header.narrowed:
            return length // NUMBERS[field.type]
        count = int.from_bytes(file.read(4), "big")
    return count if count <= length else None


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")
