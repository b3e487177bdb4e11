"""The header of a MindRecord file: its schema, its pages and the names of its family.

Owns the layout of a file, and the checks that need no row:

    0                              u64 n, the bytes of the header text
    8                              n bytes of JSON, then filler up to header_size
    header_size + page_size * k    page k; the file ends with the last used byte of its last page

A blob page has the array and `bytes` fields of the rows of one row group, a raw page the scalar
fields of one or more groups (as msgpack). All numbers are little-endian. Invariants of a `Header`:
every page lies within the file, the row groups number the rows from 0 without a gap, and a page has
no more rows than its bytes allow. Imports nothing but the standard library.

Format: mindspore/ccsrc/minddata/mindrecord of MindSpore 2.10, seen in files it wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from launcher.errors import UserError, did_you_mean

LENGTH_BYTES = 8
"""Bytes of the length in front of the header and of each row."""
LARGEST_HEADER = 128 << 20
NARROWED = {"2.0": False, "3.0": True}
"""Version of the format -> whether it narrows the integers of arrays."""
NUMBERS = {"int32": 4, "int64": 8, "float32": 4, "float64": 8}
"""Types that arrays may have, and their bytes."""
_TYPES = (*NUMBERS, "string", "bytes")
_FIELD_NAME = re.compile(r"[0-9a-zA-Z_]+")
_ENCRYPTED = b"ENCRYPT"
_MOST_SIZE = 1 << 62
_COPY = "Copy the file again, or write it again"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column."""

    name: str
    type: str
    """int32, int64, float32, float64, string or bytes."""
    shape: tuple[int, ...] | None
    """Of an array, -1 where rows differ; None for a scalar."""

    @property
    def is_integers(self) -> bool:
        """Whether a value is an array of integers, as token ids are."""
        return self.shape is not None and self.type in ("int32", "int64")


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Consecutive rows: one blob page and a part of a raw page."""

    first_row: int
    rows: int
    page: int
    """Number of the blob page."""
    blob: tuple[int, int]
    """Its used bytes in the file: begin, end."""
    raw_page: int
    raw: tuple[int, int]
    """Where its scalar fields begin in the file, and where their page ends."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The content of the header."""

    path: Path
    size: int
    """Bytes of the file."""
    mtime_ns: int
    narrowed: bool
    """Whether the integers of arrays are narrowed."""
    fields: tuple[Field, ...]
    """Sorted by name, the order in which MindSpore yields them."""
    blob_fields: tuple[str, ...]
    """The fields in a blob page, in their order there."""
    groups: tuple[RowGroup, ...]
    family: tuple[str, ...]
    """Names of all files that were written together, this one among them."""
    shard: int
    """The place of this file in `family`."""

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return sum(group.rows for group in self.groups)

    @cached_property
    def by_name(self) -> Mapping[str, Field]:
        """The fields by name."""
        return {field.name: field for field in self.fields}

    @property
    def is_renamed(self) -> bool:
        """Whether the file was written under another name."""
        return self.family[self.shard] != self.path.name


def read_header(path: Path) -> Header:
    """The header of a file. Raises UserError for a file that is damaged, encrypted or another."""
    try:
        with path.open("rb") as file:
            status = path.stat()
            content = _content(path, file, status.st_size)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})",
            where=str(path),
            rule="every file of a data set must be readable",
            advice="Check the path and its permissions",
        ) from error
    return _Parser(path, content, status.st_size, status.st_mtime_ns).header()


def _content(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    """The JSON of the header."""
    if size < LENGTH_BYTES:
        _damaged(path, f"the file has {size} bytes", "a MindRecord file has a header")
    if size > len(_ENCRYPTED):
        file.seek(-len(_ENCRYPTED), 2)
        if file.read() == _ENCRYPTED:
            raise UserError(
                "this MindRecord file is encrypted",
                where=str(path),
                rule="encrypted files are not read",
                advice="Decrypt it with MindSpore: read it with set_enc_key and write it again "
                "without",
            )
    file.seek(0)
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if not 2 <= length <= LARGEST_HEADER:
        _damaged(path, f"its header would have {length} bytes",
                 f"a MindRecord file begins with the length of its header, at most "
                 f"{LARGEST_HEADER} bytes")  # fmt: skip
    if LENGTH_BYTES + length > size:
        _damaged(path, f"the file has {size} bytes, its header alone {LENGTH_BYTES + length}",
                 "a file has all of its header")  # fmt: skip
    try:
        content = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header cannot be parsed ({_short(error)})",
                 "the header of a MindRecord file is JSON")  # fmt: skip
    if not isinstance(content, dict):
        _damaged(path, "its header is not an object", "the header of a MindRecord file is JSON")
    return content


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:77] + "..." if len(text) > 80 else text


def _damaged(path: Path, what: str, rule: str, *, advice: str = _COPY) -> NoReturn:
    raise UserError(what, where=str(path), rule=rule, advice=advice)


class _Parser:
    """Values of the JSON, each checked."""

    def __init__(self, path: Path, content: dict[str, Any], size: int, mtime_ns: int) -> None:
        self.path, self.content, self.size, self.mtime_ns = path, content, size, mtime_ns

    def header(self) -> Header:
        narrowed = self._narrowed()
        fields, blob_fields = self._schema()
        family, shard = self._family()
        return Header(
            path=self.path, size=self.size, mtime_ns=self.mtime_ns, narrowed=narrowed,
            fields=fields, blob_fields=blob_fields, groups=self._groups(), family=family,
            shard=shard,
        )  # fmt: skip

    def wrong(self, key: str, value: Any, rule: str) -> NoReturn:
        shown = json.dumps(value)
        shown = shown[:57] + "..." if len(shown) > 60 else shown
        _damaged(self.path, f"the header has {key} {shown}", rule)

    def number(self, source: Mapping[str, Any], key: str, what: str = "") -> int:
        value = source.get(key)
        if type(value) is not int or not 0 <= value < _MOST_SIZE:
            self.wrong(what + key, value, "it must be a number of bytes, pages or rows")
        return value

    def _narrowed(self) -> bool:
        version = self.content.get("version")
        if not isinstance(version, str) or version not in NARROWED:
            raise UserError(
                f"version {version!r} of MindRecord",
                where=str(self.path),
                rule="this version is not read",
                nearest=f"Known: {', '.join(NARROWED)}",
                advice="Write the file again with MindSpore 2",
            )
        return NARROWED[version]

    def _schema(self) -> tuple[tuple[Field, ...], tuple[str, ...]]:
        schemas = self.content.get("schema")
        if not isinstance(schemas, list) or len(schemas) != 1 or not isinstance(schemas[0], dict):
            self.wrong("schema", schemas, "a file has exactly one schema")
        columns, blobs = schemas[0].get("schema"), schemas[0].get("blob_fields")
        if not isinstance(columns, dict) or not columns:
            self.wrong("schema", columns, "a schema has columns")
        fields = tuple(self._field(name, columns[name]) for name in sorted(columns))
        expected = {field.name for field in fields if field.shape is not None}
        expected |= {field.name for field in fields if field.type == "bytes"}
        if (
            not isinstance(blobs, list)
            or not all(isinstance(name, str) for name in blobs)
            or sorted(blobs) != sorted(expected)
        ):
            self.wrong("blob_fields", blobs, "they are the arrays and the fields of type bytes")
        return fields, tuple(blobs)

    def _field(self, name: str, content: Any) -> Field:
        if not _FIELD_NAME.fullmatch(name):
            self.wrong("column", name, "the name of a column has letters, digits and _")
        kind = content.get("type") if isinstance(content, dict) else None
        if not isinstance(kind, str) or kind not in _TYPES:
            self.wrong(f"column {name} of type", kind, f"the types are {', '.join(_TYPES)}")
        shape = content.get("shape")
        if shape is None:
            return Field(name=name, type=kind, shape=None)
        if (
            kind not in NUMBERS
            or not isinstance(shape, list)
            or not all(type(size) is int and -1 <= size < _MOST_SIZE for size in shape)
            or shape.count(-1) > 1
        ):
            self.wrong(f"column {name} of shape", shape, "an array of numbers has sizes, one may "
                       "be -1")  # fmt: skip
        return Field(name=name, type=kind, shape=tuple(shape))

    def _family(self) -> tuple[tuple[str, ...], int]:
        names, shard = self.content.get("shard_addresses"), self.content.get("shard_id")
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(name, str) and _is_file_name(name) for name in names)
        ):
            self.wrong("shard_addresses", names, "it lists the names of files")
        if type(shard) is not int or not 0 <= shard < len(names):
            self.wrong("shard_id", shard, f"it is one of {len(names)} files")
        return tuple(names), shard

    def _groups(self) -> tuple[RowGroup, ...]:
        """The row groups in the order of their rows."""
        pages = self.content.get("page")
        if pages is None:
            return ()
        if not isinstance(pages, list) or not all(isinstance(page, dict) for page in pages):
            self.wrong("page", pages, "it lists the pages")
        raw, blobs = dict[int, tuple[int, tuple[int, int]]](), []
        for page in pages:
            number = self.number(page, "page_id", "a page with ")
            begin, end = self._place(page, number)
            if page.get("page_type") == "RAW_DATA":
                for group, offset in self._raw_groups(page, number, end - begin):
                    raw[group] = number, (begin + offset, end)
            elif page.get("page_type") == "BLOB_DATA":
                blobs.append((page, number, (begin, end)))
            else:
                self.wrong(f"page {number} of type", page.get("page_type"),
                           "a page is RAW_DATA or BLOB_DATA")  # fmt: skip
        groups = [self._group(page, number, place, raw) for page, number, place in blobs]
        groups.sort(key=lambda group: (group.first_row, group.rows))
        row = 0
        for group in groups:
            if group.first_row != row:
                self.wrong(f"page {group.page} with start_row_id", group.first_row,
                           f"the rows before it end with {row}")  # fmt: skip
            row += group.rows
        return tuple(groups)

    def _place(self, page: dict[str, Any], number: int) -> tuple[int, int]:
        """Where the used bytes of a page begin and end."""
        slot = self.number(self.content, "page_size")
        used = self.number(page, "page_size", f"page {number} with ")
        begin = self.number(self.content, "header_size") + slot * number
        if used > slot:
            self.wrong(f"page {number} with page_size", used, f"a page has {slot} bytes")
        if begin + used > self.size:
            _damaged(
                self.path,
                f"page {number} ends at byte {begin + used}, the file at {self.size}",
                "a file has all of its pages",
            )
        return begin, begin + used

    def _raw_groups(self, page: dict[str, Any], number: int, used: int) -> list[tuple[int, int]]:
        entries = page.get("row_group_ids")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            self.wrong(f"page {number} with row_group_ids", entries, "it lists row groups")
        found = [(self.number(entry, "id", f"page {number} with row group "),
                  self.number(entry, "offset", f"page {number} with row group "))
                 for entry in entries]  # fmt: skip
        for group, offset in found:
            if offset > used:
                self.wrong(f"page {number} with row group {group} at", offset,
                           f"{used} bytes of the page are used")  # fmt: skip
        return found

    def _group(
        self,
        page: dict[str, Any],
        number: int,
        place: tuple[int, int],
        raw: Mapping[int, tuple[int, tuple[int, int]]],
    ) -> RowGroup:
        what = f"page {number} with "
        first, end = (self.number(page, key, what) for key in ("start_row_id", "end_row_id"))
        group = self.number(page, "page_type_id", what)
        if not 0 <= end - first <= (place[1] - place[0]) // LENGTH_BYTES:
            self.wrong(f"{what}end_row_id", end,
                       f"it has {place[1] - place[0]} bytes from row {first}")  # fmt: skip
        if group not in raw and end > first:
            self.wrong(f"{what}page_type_id", group, "a row group has a place in a raw page")
        raw_page, raw_place = raw.get(group, (number, (place[1], place[1])))
        if end - first > (raw_place[1] - raw_place[0]) // LENGTH_BYTES:
            self.wrong(f"page {raw_page} with row group", group,
                       f"{end - first} rows do not fit into its bytes")  # fmt: skip
        return RowGroup(first_row=first, rows=end - first, page=number, blob=place,
                        raw_page=raw_page, raw=raw_place)  # fmt: skip


def _is_file_name(name: str) -> bool:
    return name.isprintable() and bool(name) and name == Path(name).name


def nearest_field(name: str, header: Header) -> str:
    """The nearest column of a file to a name, else all of them."""
    return did_you_mean(name, header.by_name) or f"Its columns: {', '.join(header.by_name)}"
