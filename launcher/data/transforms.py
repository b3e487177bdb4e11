"""`transforms`: the steps on records that launcher/config/schema/transforms.py names.

Each does what the method of `datasets.Dataset` does: `shuffle` gives the permutation of numpy's
`default_rng(seed)`, `sort` is stable with nulls last, `shard` cuts as the library does. Steps work
on records one by one, but select, shuffle, sort and shard, which hold all of them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from launcher.config.schema.transforms import Transform, columns_of
from launcher.data.column_map import RequiredColumns
from launcher.data.records import Record, convert_records, kind_of
from launcher.errors import UserError

Records = Iterable[Record | UserError]

_KEY = "data_loader.transforms"


def apply_transform(records: Records, step: Transform) -> Iterator[Record | UserError]:
    """The records after one step. Raises UserError for columns and indices that do not exist."""
    return _STEPS[step.type](records, step)


def _take(records: Records, step: Transform) -> Iterator[Record | UserError]:
    yield from islice(records, step["n"])


def _skip(records: Records, step: Transform) -> Iterator[Record | UserError]:
    yield from islice(records, step["n"], None)


def _all(records: Records) -> list[Record]:
    return list(convert_records(records, lambda record: record))


def _select(records: Records, step: Transform) -> Iterator[Record | UserError]:
    found = _all(records)
    wrong = next((index for index in step["indices"] if index >= len(found)), None)
    if wrong is not None:
        raise UserError(
            f"{_KEY}: select has the index {wrong}",
            rule=f"there are {len(found)} records at this step, numbered from 0",
            nearest=f"Nearest: {len(found) - 1}" if found else "",
            advice="Remove the index",
        )
    yield from (found[index] for index in step["indices"])


def _shuffle(records: Records, step: Transform) -> Iterator[Record | UserError]:
    found = _all(records)
    yield from (found[i] for i in np.random.default_rng(step["seed"]).permutation(len(found)))


def _shard(records: Records, step: Transform) -> Iterator[Record | UserError]:
    found, count, index = _all(records), step["num_shards"], step["index"]
    if not step["contiguous"]:
        yield from found[index::count]
        return
    size, rest = divmod(len(found), count)
    start = size * index + min(index, rest)
    yield from found[start : start + size + (index < rest)]


def _sort(records: Records, step: Transform) -> Iterator[Record | UserError]:
    names, reverse = columns_of(step), step["reverse"]
    directions = reverse if isinstance(reverse, list) else [reverse] * len(names)
    columns = RequiredColumns(names, _KEY)
    found = _all(records)
    for record in found:
        columns.see(record)
    columns.finish()
    for name, is_reverse in reversed(list(zip(names, directions, strict=True))):
        found = _sorted(found, name, is_reverse)
    yield from found


def _sorted(records: list[Record], name: str, is_reverse: bool) -> list[Record]:
    known = [record for record in records if record.value.get(name) is not None]
    nulls = [record for record in records if record.value.get(name) is None]
    try:
        return sorted(known, key=lambda record: record.value[name], reverse=is_reverse) + nulls
    except TypeError:
        first = type(known[0].value[name])
        other = next((r for r in known if type(r.value[name]) is not first), known[0])
        raise UserError(
            f"{_KEY}: column {name!r} has {kind_of(other.value[name])}, and "
            f"{kind_of(known[0].value[name])} in {known[0].where}",
            where=other.where,
            rule="records are sorted by values that can be compared",
            advice="Fix the record, or sort by another column",
        ) from None


def _flatten(records: Records, step: Transform) -> Iterator[Record | UserError]:
    for record in records:
        if isinstance(record, Record):
            record = replace(record, value=_flat(record.value, step["max_depth"]))
        yield record


def _flat(value: dict[str, Any], depth: int) -> dict[str, Any]:
    found = {}
    for name, item in value.items():
        if isinstance(item, dict) and depth > 0:
            inner = _flat(item, depth - 1)
            found.update({f"{name}.{key}": child for key, child in inner.items()})
        else:
            found[name] = item
    return found


def _rename(records: Records, step: Transform) -> Iterator[Record | UserError]:
    if step.type == "rename_column":
        names = {step["original_column_name"]: step["new_column_name"]}
    else:
        names = step["column_mapping"]

    def change(record: Record) -> dict[str, Any]:
        clash = next((new for old, new in names.items() if old in record.value and new != old
                      and new in record.value and new not in names), None)  # fmt: skip
        if clash is not None:
            raise UserError(
                f"{_KEY}: {step.type} to {clash!r}, which is a column already",
                where=record.where,
                rule="two columns cannot have one name",
                advice="Remove the other column first, with remove_columns",
            )
        return {names.get(name, name): item for name, item in record.value.items()}

    return _changed(records, step, change)


def _remove_columns(records: Records, step: Transform) -> Iterator[Record | UserError]:
    names = set(columns_of(step))
    return _changed(
        records, step, lambda record: {k: v for k, v in record.value.items() if k not in names}
    )


def _select_columns(records: Records, step: Transform) -> Iterator[Record | UserError]:
    names = columns_of(step)
    return _changed(
        records,
        step,
        lambda record: {name: record.value[name] for name in names if name in record.value},
    )


def _changed(
    records: Records, step: Transform, change: Callable[[Record], dict[str, Any]]
) -> Iterator[Record | UserError]:
    """Records with other columns, of which some record must have those that the step names."""
    columns = RequiredColumns(columns_of(step), f"{_KEY}: {step.type}")
    for record in records:
        if isinstance(record, Record):
            columns.see(record)
            record = replace(record, value=change(record))
        yield record
    columns.finish()


_STEPS: dict[str, Callable[[Records, Transform], Iterator[Record | UserError]]] = {
    "take": _take,
    "skip": _skip,
    "select": _select,
    "shuffle": _shuffle,
    "sort": _sort,
    "shard": _shard,
    "flatten": _flatten,
    "rename_column": _rename,
    "rename_columns": _rename,
    "remove_columns": _remove_columns,
    "select_columns": _select_columns,
}
