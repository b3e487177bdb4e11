"""`column_map`: fields that a loader reads, taken from columns of other names.

Invariants: a source column that no record of a file has is an error, never an empty field; a record
that has a field beside the column that is mapped to it is an error: one of them would be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from launcher.data.records import Record
from launcher.data.strictness import is_absent, names_of
from launcher.data.tables import delimiter_advice
from launcher.errors import UserError, did_you_mean
from launcher.json_text import printable

_REQUIRED = frozenset({"text", "instruction", "output", "messages", "conversations"})
"""Fields that every record has; others may be missing from some."""
_ABSENT = object()


def map_columns(
    records: Iterable[Record | UserError], column_map: Mapping[str, str] | None
) -> Iterator[Record | UserError]:
    """The records of a file with the fields of `column_map` in place of the columns they are taken
    from.

    Errors are passed on. Raises UserError for a column that is in no record.
    """
    if not column_map:
        yield from records
        return
    columns = MappedColumns(column_map)
    yield from columns.map(records, begins_file=True)
    columns.finish()


class MappedColumns:
    """Maps records of which it sees some at a time, and knows which columns none of them had."""

    def __init__(self, column_map: Mapping[str, str]) -> None:
        self._map = column_map
        self._always = [source for target, source in column_map.items() if target in _REQUIRED]
        self._columns = self._required()

    def map(
        self, records: Iterable[Record | UserError], *, begins_file: bool
    ) -> Iterator[Record | UserError]:
        """The records with the fields of the map; errors are passed on. Raises UserError where the
        first record of a file lacks a column that every record has."""
        for record in records:
            if isinstance(record, UserError):
                yield record
                continue
            if begins_file:
                self._required().see(record, self._always)
                begins_file = False
            self._columns.see(record)
            yield _mapped(record, self._map)

    def first(self, record: Record) -> Record:
        """The first record of a file, as `map` gives it, without counting it as seen. Raises
        UserError where it is wrong."""
        self._required().see(record, self._always)
        mapped = _mapped(record, self._map)
        if isinstance(mapped, UserError):
            raise mapped
        return mapped

    @property
    def unseen(self) -> list[str]:
        """The columns that no record had."""
        return self._columns.unseen

    def finish(self) -> None:
        """Raise UserError for a column that no record had."""
        self._columns.finish()

    def _required(self) -> RequiredColumns:
        return RequiredColumns(self._map.values(), "data_loader.column_map")


def _mapped(record: Record, column_map: Mapping[str, str]) -> Record | UserError:
    sources = set(column_map.values())
    for target, source in column_map.items():
        if target not in sources and not is_absent(record.value.get(target)):
            return UserError(
                f"has the column {target!r} and the column {source!r}, which is mapped to it",
                where=record.where,
                rule="a field is taken from one column",
                advice=f"Remove `{target}: {source}` from data_loader.column_map, or drop the "
                f"column with transforms: [{{type: remove_columns, column_names: {target}}}]",
            )
    consumed = {
        source if source in record.value else source.partition(".")[0] for source in sources
    }
    value = {name: item for name, item in record.value.items() if name not in consumed}
    for target, source in column_map.items():
        found = _look_up(record.value, source)
        if found is not _ABSENT:
            value[target] = found
    return Record(record.where, value, record.has_all_columns)


def _look_up(value: Any, name: str) -> Any:
    """A column, or the field of a nested record that a dotted name means; `_ABSENT` without it."""
    if isinstance(value, dict) and name in value:
        return value[name]
    first, dot, rest = name.partition(".")
    if not dot or not isinstance(value, dict) or first not in value:
        return _ABSENT
    return _look_up(value[first], rest)


class RequiredColumns:
    """Checks that records have the columns that `key` of the configuration names."""

    def __init__(self, names: Iterable[str], key: str) -> None:
        self._key = key
        self.unseen = list(dict.fromkeys(names))
        """The columns that no record had."""
        self._first: Record | None = None

    def see(self, record: Record, always: Iterable[str] = ()) -> None:
        """Note the columns of a record. Raises UserError where the first record lacks one of
        `always`, or any of a table."""
        if not self.unseen and self._first is not None:
            return
        self.unseen = [name for name in self.unseen if _look_up(record.value, name) is _ABSENT]
        if self._first is None:
            self._first = record
            needed = set(always)
            missing = [name for name in self.unseen if record.has_all_columns or name in needed]
            if missing:
                raise self._error(missing[0], record)

    def finish(self) -> None:
        """Raise UserError for a column that no record had."""
        if self.unseen and self._first is not None:
            raise self._error(self.unseen[0], self._first)

    def _error(self, name: str, record: Record) -> UserError:
        near = printable(did_you_mean(name, record.value))
        found = f"Columns found: {names_of(record.value)}"
        return UserError(
            f"there is no column {printable(name)!r}",
            where=record.where,
            rule=f"{self._key} names columns of the files",
            nearest=near or found,
            advice=delimiter_advice(record.value) or (found if near else ""),
        )
