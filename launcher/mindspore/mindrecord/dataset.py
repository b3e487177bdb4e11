"""`MindDataset`: rows of tokens in MindRecord files, read in place.

Owns `LOADER`, and the way from a data section to rows: which files, which columns, whether labels
are shifted, which tokens are padding. Every row of the files is a row of the data set; the order of
a run is Slipway's own (or that of the files without `shuffle`), never MindSpore's random one.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

from launcher.config.schema import DataLoaderSection
from launcher.data.cache import make_once
from launcher.data.loaders.base import Recipe, RowLoader, warn_without_end_token
from launcher.data.rows import NO_TARGET, Counts, Ints, Row, RowDataset
from launcher.errors import UserError
from launcher.mindspore.mindrecord.columns import Columns, choose_columns
from launcher.mindspore.mindrecord.files import RecordFiles, find_records
from launcher.mindspore.mindrecord.index import (
    Index,
    Pass,
    index_name,
    open_index,
    values_of,
    write_index,
)
from launcher.mindspore.mindrecord.reader import FileReader
from launcher.mindspore.mindrecord.row_rule import RowRule, is_shifted

LOOKED_AT = 64
"""Rows by which shifted labels are recognised."""


def files_of(section: DataLoaderSection) -> RecordFiles:
    """The files of a section. Raises UserError."""
    if not section.paths:
        raise UserError(
            "data_loader.dataset_dir is not set",
            rule="MindDataset needs to know which files to read",
            advice="Give a MindRecord file, a folder or a glob",
        )
    return find_records(section.paths, is_list=not isinstance(section.dataset_files, str | None))


class MindRecordRows:
    """The rows of an index."""

    def __init__(
        self, files: list[FileReader], index: Index, columns: Columns, rule: RowRule
    ) -> None:
        self._files, self._index, self._columns, self._rule = files, index, columns, rule
        self._starts: list[int] = index.facts["starts"]

    def __len__(self) -> int:
        return len(self._index.offsets)

    def counts(self, indices: Ints) -> Counts:
        targets, tokens = self._index.targets[indices], self._index.tokens[indices]
        return Counts(targets.astype("int64"), tokens.astype("int64"))

    def row(self, index: int) -> Row:
        number = bisect_right(self._starts, index) - 1
        file = self._files[number]
        blob = file.row_at(int(self._index.offsets[index]))
        return self._rule.row(*values_of(file, blob, self._columns, index - self._starts[number]))


def prepare(recipe: Recipe) -> str:
    """The name of the folder of the index in `cache_dir`, which is made where there is none."""
    started = time.monotonic()
    records, files, columns, settings = _plan(recipe)
    folder = recipe.cache_dir / index_name(settings, files)
    shifted = _labels_are_shifted(recipe, files, columns)
    work = Pass(
        files=files,
        columns=columns,
        rule=_rule(recipe, shifted),
        most=recipe.loader.num_samples,
        on_progress=recipe.on_progress,
    )
    try:
        is_new = make_once(
            folder,
            lambda scratch: write_index(scratch, settings | {"shifted": shifted}, work),
            lambda: _opened(folder) is not None,
            verb="read",
            log=recipe.log,
            on_progress=recipe.on_progress,
        )
    except OSError as error:
        raise UserError(
            f"the data cache cannot be written ({error.strerror or error})",
            where=str(error.filename or recipe.cache_dir),
            rule="an index of the rows is kept in a folder that this user may write to",
            advice="Free some space, give write permission, or set another output_dir",
        ) from error
    index = open_index(folder)
    facts = index.facts
    origin = f"{time.monotonic() - started:.1f} s" if is_new else f"from the index {folder}"
    _report(recipe, records, columns, facts, origin)
    if (end := recipe.loader.eod_token_id) is not None:
        rows = MindRecordRows(files, index, columns, work.rule)
        warn_without_end_token(rows, end, "data_loader.eod_token_id", recipe.log)
    return folder.name


def open_rows(recipe: Recipe, prepared: str) -> RowDataset:
    """The rows of the index that `prepare` named."""
    _, files, columns, _ = _plan(recipe)
    index = open_index(recipe.cache_dir / prepared)
    loader = recipe.loader
    return RowDataset(
        rows=MindRecordRows(files, index, columns, _rule(recipe, index.facts["shifted"])),
        seq_length=recipe.seq_length,
        packed=_is_packed(recipe),
        content=_content(recipe, index),
        largest_token=index.facts["largest_token"],
        name=loader.paths[0],
    )


LOADER = RowLoader(prepare=prepare, open=open_rows)


def _plan(recipe: Recipe) -> tuple[RecordFiles, list[FileReader], Columns, dict[str, Any]]:
    """The files, opened; the columns; and the settings that decide the index."""
    records = files_of(recipe.loader)
    columns = choose_columns(recipe.loader.column_map, records.headers[0])
    settings = {
        "columns": [columns.input_ids, columns.labels, columns.loss_mask],
        "labels": recipe.loader.labels,
        "pad_token": _pad_token(recipe),
        "ignore_token": recipe.loader.ignore_token_id,
        "seq_length": recipe.seq_length,
        "num_samples": recipe.loader.num_samples,
    }
    return records, [FileReader(header) for header in records.headers], columns, settings


def _content(recipe: Recipe, index: Index) -> str:
    """What decides the rows, on every machine the same: their bytes, and the rules."""
    facts = index.facts
    rules = [facts[key] for key in ("columns", "shifted", "pad_token", "ignore_token")]
    return f"{facts['content']}/{rules}/{recipe.loader.eod_token_id}"


def _rule(recipe: Recipe, shifted: bool) -> RowRule:
    padding, vocabulary = _pad_token(recipe), recipe.model_config.get("vocab_size") or 1 << 62
    return RowRule(
        seq_length=recipe.seq_length,
        shifted=shifted,
        pad_token=padding,
        fill_token=0 if padding is None or padding >= vocabulary else padding,
        ignore_token=recipe.loader.ignore_token_id,
        eod_token=recipe.loader.eod_token_id,
        packed=_is_packed(recipe),
    )


def _is_packed(recipe: Recipe) -> bool:
    """Whether rows have documents: their own, or because a mixture has packed rows."""
    return recipe.loader.eod_token_id is not None or recipe.section.packing


def _pad_token(recipe: Recipe) -> int | None:
    """The token that is no target where it is an input: the loader's, else the model's."""
    known = (recipe.loader.pad_token_id, recipe.model_config.get("pad_token_id"))
    return next((token for token in known if isinstance(token, int) and token >= 0), None)


def _labels_are_shifted(recipe: Recipe, files: list[FileReader], columns: Columns) -> bool:
    """By `data_loader.labels`, else by the first rows. Raises UserError where they do not."""
    written = recipe.loader.labels
    if columns.labels is None:
        return False
    places = [(file, row) for file in files for row in range(min(len(file), LOOKED_AT))]
    rows = []
    for file, row in places[:LOOKED_AT]:
        ids, labels, _ = values_of(file, file.blob(row), columns, row)
        assert labels is not None
        rows.append((ids, labels))
    seen = is_shifted(rows, recipe.loader.ignore_token_id)
    if written is None and seen is None and rows:
        raise UserError(
            f"it is not seen from the first rows whether {columns.labels} are shifted",
            where=str(files[0].header.path),
            rule="labels[t] is either input_ids[t] (unshifted) or the token after it (shifted)",
            advice="Set data_loader.labels to unshifted or shifted",
        )
    if written is not None and seen is not None and seen != (written == "shifted"):
        is_so = "the token after input_ids[t]" if seen else "input_ids[t]"
        recipe.log(
            f"warning: data_loader.labels is {written}, but in the first rows of "
            f"{files[0].header.path} {columns.labels}[t] is {is_so}"
        )
    return written == "shifted" if written is not None else bool(seen)


def _opened(folder: Path) -> Index | None:
    try:
        return open_index(folder)
    except (OSError, ValueError, KeyError):
        return None


def _report(
    recipe: Recipe, records: RecordFiles, columns: Columns, facts: dict[str, Any], origin: str
) -> None:
    """Log what the data set is, and what of it is not used. Raises UserError for one without
    targets."""
    rows = facts["rows"]
    if rows == 0 or facts["without_target"] == rows:
        raise UserError(
            f"data_loader: {recipe.loader.paths[0]!r} has nothing to train on ({rows} rows)",
            rule="a data set has a row with a label that counts",
            nearest=f"Padding is token {facts['pad_token']}, ignored labels are "
            f"{facts['ignore_token']} and {NO_TARGET}",
            advice="Look into the files",
        )
    lengths = f"{facts['shortest']:,} to {facts['longest']:,}"
    if facts["shortest"] == facts["longest"]:
        lengths = f"{facts['longest']:,}"
    recipe.log(
        f"data: {rows:,} rows of {lengths} tokens in {len(records.headers):,} MindRecord file(s), "
        f"{facts['stored_tokens']:,} tokens, rows of {recipe.seq_length} ({origin})"
    )
    used = " and ".join(columns.names)
    kind = ""
    if columns.labels is not None:
        kind = f" ({columns.labels} are {'shifted' if facts['shifted'] else 'unshifted'})"
    if others := columns.unused(records.headers[0]):
        kind += f"; not used: {', '.join(others)}"
    recipe.log(f"data: columns {used}{kind}")
    for note in records.notes:
        recipe.log(note)
    if facts["without_target"]:
        recipe.log(f"warning: {facts['without_target']:,} row(s) have no target")
    cut = facts["longest"] - (not facts["shifted"])
    if cut < recipe.seq_length:
        recipe.log(
            f"note: the longest row has {facts['longest']} tokens, which fill {cut} of "
            f"{recipe.seq_length} positions; the rest is padding"
        )
