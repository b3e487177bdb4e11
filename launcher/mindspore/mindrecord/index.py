"""The index of a data set of MindRecord files, made in one pass over all rows.

Owns a folder of the data cache:

    offsets.bin   int64   where the length of each row is in its file
    targets.bin   int32   labels of the row that count for the loss
    tokens.bin    int32   tokens of the row without padding
    facts.json            the files, what decided the above, and what the pass found

The pass reads every row once, so that a damaged row, a row that is too long or a token that is no
token is found before the first step, and any row can be read directly afterwards. Invariants: the
folder is named by a hash of the files and settings; of the rows themselves nothing is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from launcher.data.progress import Meter, OnProgress
from launcher.data.rows import NO_TARGET, Ints
from launcher.data.store import INDEX_DTYPE, map_array, write_array
from launcher.errors import UserError
from launcher.mindspore.mindrecord.columns import Columns
from launcher.mindspore.mindrecord.header import RowGroup
from launcher.mindspore.mindrecord.integers import NotNarrowed, count_of
from launcher.mindspore.mindrecord.reader import FileReader
from launcher.mindspore.mindrecord.row_rule import RowRule
from launcher.mindspore.mindrecord.walk import Bytes

VERSION = 1
"""Part of every key: raise it when the same files would be indexed in another way."""
COUNT_DTYPE = np.dtype("<i4")
IGNORED = "Where it marks labels without loss, set data_loader.ignore_token_id"
_ARRAYS = {"offsets": INDEX_DTYPE, "targets": COUNT_DTYPE, "tokens": COUNT_DTYPE}


@dataclass(frozen=True, kw_only=True)
class Index:
    """The arrays of the folder, mapped, and its facts."""

    offsets: Ints
    targets: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    facts: dict[str, Any]


def values_of(
    file: FileReader, blob: Bytes, columns: Columns, row: int
) -> tuple[Ints, Ints | None, npt.NDArray[Any] | None]:
    """The tokens, labels and loss mask of a blob row. Raises UserError."""
    ids = file.integers(file.part(blob, columns.input_ids, row), columns.input_ids, row)
    labels = mask = None
    if columns.labels is not None:
        labels = file.integers(file.part(blob, columns.labels, row), columns.labels, row)
    if columns.loss_mask is not None:
        mask = file.numbers(file.part(blob, columns.loss_mask, row), columns.loss_mask, row)
    for name, values in ((columns.labels, labels), (columns.loss_mask, mask)):
        if values is not None and len(values) != len(ids):
            wrong_row(file, row, f"it has {len(ids)} {columns.input_ids} and {len(values)} {name}",
                      "the columns of a row are equally long")  # fmt: skip
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        wrong_row(file, row, f"{columns.loss_mask} has a value that is neither 0 nor 1",
                  "a target counts or does not: weights are not supported")  # fmt: skip
    return ids, labels, mask


def wrong_row(file: FileReader, row: int, what: str, rule: str, advice: str = "") -> NoReturn:
    """Raise the error of a row whose content does not fit."""
    page = file.group_of(row).page
    raise UserError(
        f"row {row}, page {page}: {what}", where=str(file.header.path), rule=rule, advice=advice
    )


class GroupIndex(NamedTuple):
    """What is kept of the rows of one group; arrays with one entry for each row."""

    offsets: Ints
    targets: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    """Tokens in the file."""
    largest_token: int
    content: str
    """Hash of the rows."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over the rows of `files`, at most `most` of them."""

    files: Sequence[FileReader]
    columns: Columns
    rule: RowRule
    most: int | None
    on_progress: OnProgress

    def run(self, folder: Path) -> dict[str, Any]:
        """Write the arrays, and return the facts. Raises UserError for a row that is wrong."""
        groups, starts, rows = list[GroupIndex](), list[int](), 0
        size = sum(_bytes(group) for file in self.files for group in file.header.groups)
        meter = Meter("read", size, self.on_progress)
        for file in self.files:
            starts.append(rows)
            for group in file.header.groups:
                room = group.rows if self.most is None else min(group.rows, self.most - rows)
                if room:
                    groups.append(self.index_group(file, group, room))
                    file.release(group)
                    rows += room
                    meter.tokens += int(groups[-1].lengths.sum(dtype=np.int64))
                    meter.add(_bytes(group))
        for name, dtype in _ARRAYS.items():
            parts = [getattr(group, name) for group in groups]
            write_array(folder / f"{name}.bin", np.concatenate([np.zeros(0, dtype=dtype), *parts]))
        return {"rows": rows, "starts": starts, **_totals(groups)}

    def index_group(self, file: FileReader, group: RowGroup, rows: int) -> GroupIndex:
        """The first `rows` rows of a group. Raises UserError for a row that is wrong."""
        offsets = file.offsets(group)
        counts = list[tuple[int, int, int]]()  # targets, tokens, lengths
        largest = 0
        for place, offset in enumerate(offsets[:rows].tolist()):
            row = group.first_row + place
            ids, labels, mask = values_of(file, file.row_at(offset), self.columns, row)
            if len(ids) > self.rule.longest:
                self._too_long(file, row, len(ids))
            tokens, targets = self.rule.cut(ids, labels, mask)
            counted = targets[targets != NO_TARGET]
            for values in (ids,) if labels is None else (ids, counted):
                if len(values):
                    check_tokens(file, row, values, IGNORED)
                    largest = max(largest, int(values.max()))
            counts.append((len(counted), self.rule.tokens_of(tokens, targets), len(ids)))
        arrays = np.array(counts, dtype=np.int32).T
        content = xxh3_128(file.data[offsets[0] : offsets[rows]].data).hexdigest()
        return GroupIndex(offsets[:rows], arrays[0], arrays[1], arrays[2], largest, content)

    def _too_long(self, file: FileReader, row: int, length: int) -> NoReturn:
        """The error of a row that is longer than seq_length, with the longest row of all."""
        longest = max(length, *(_longest(other, self.columns.input_ids) for other in self.files))
        seq_length, shifted = self.rule.seq_length, self.rule.shifted
        made = "as many" if shifted else f"{longest - 1}, since the last one is only predicted"
        other = ""
        if shifted and longest == seq_length + 1:
            other = ", or data_loader.labels: unshifted where labels[t] is input_ids[t]"
        raise UserError(
            f"row {row} has {length} tokens, and seq_length is {seq_length}",
            where=str(file.header.path),
            rule=f"rows are never cut: the longest has {longest} tokens, which takes a row of "
            f"{made}",
            nearest=f"Set train_dataset.seq_length: {longest - (not shifted)}{other}",
        )


def check_tokens(file: FileReader, row: int, values: Ints, advice: str) -> None:
    """Raise UserError for a value of a row that is no token."""
    smallest = int(values.min()) if len(values) else 0
    if smallest < 0:
        wrong_row(file, row, f"it has the token {smallest}", "tokens are numbered from 0", advice)


def _bytes(group: RowGroup) -> int:
    return group.blob[1] - group.blob[0]


def _totals(groups: Sequence[GroupIndex]) -> dict[str, Any]:
    """What all groups have together."""
    lengths = [group.lengths for group in groups]
    return {
        "stored_tokens": sum(int(part.sum(dtype=np.int64)) for part in lengths),
        "shortest": min((int(part.min()) for part in lengths), default=0),
        "longest": max((int(part.max()) for part in lengths), default=0),
        "without_target": sum(int((group.targets == 0).sum()) for group in groups),
        "largest_token": max((group.largest_token for group in groups), default=0),
        "content": xxh3_128("".join(group.content for group in groups).encode()).hexdigest(),
    }


def _longest(file: FileReader, name: str) -> int:
    """Tokens of the longest row, by the number in front of each."""
    longest, size = 0, 4 if file.header.by_name[name].type == "int32" else 8
    for group in file.header.groups:
        for place, offset in enumerate(file.offsets(group)[:-1]):
            part = file.part(file.row_at(int(offset)), name, group.first_row + place)
            try:
                count = count_of(part) if file.header.narrowed else len(part) // size
            except NotNarrowed:
                continue  # a damaged row, reported once the length is right
            longest = max(longest, count)
    return longest


def write_index(folder: Path, settings: dict[str, Any], work: Pass) -> None:
    """Write the files of `folder`, which exists. Raises UserError and OSError."""
    facts = settings | work.run(folder)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def open_index(folder: Path) -> Index:
    """Map an index. Raises OSError, ValueError or KeyError where it is damaged."""
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    arrays = {
        name: map_array(folder / f"{name}.bin", dtype, facts["rows"])
        for name, dtype in _ARRAYS.items()
    }
    return Index(facts=facts, **arrays)


def index_name(settings: dict[str, Any], files: Sequence[FileReader]) -> str:
    """The name of the folder: a hash of the files and of what decides the index."""
    stamps = [
        [str(file.header.path.resolve()), file.header.size, file.header.mtime_ns] for file in files
    ]
    key = json.dumps([VERSION, settings, stamps], sort_keys=True)
    return "mindrecord-" + xxh3_128(key.encode()).hexdigest()
