"""MindRecord files read as MindSpore reads them, and damaged ones are refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.errors import UserError
from launcher.extensions import TOKEN_READERS, required
from launcher.mindspore.mindrecord.files import find_records
from launcher.mindspore.mindrecord.header import read_header
from launcher.mindspore.mindrecord.reader import RecordReader, open_records, read_rows
from tests.data.mindrecord_writer import TOKENS, Schema, token_rows, write_mindrecord
from tests.mindspore.records import expected, plain, unpack, unpack_default_sizes

GOLDENS = {
    "wiki64.mindrecord": "wiki64.mindrecord",
    "alpaca65.mindrecord": "alpaca65.mindrecord",
    "qwen_like.mindrecord": "qwen_like.mindrecord",
    "manypages.mindrecord": "manypages.mindrecord",
    "mixed.mindrecord": "mixed.mindrecord",
    "text.mindrecord": "text.mindrecord",
    "shards.mindrecord1": "shards.mindrecord",
    "shards11.mindrecord10": "shards11.mindrecord",
}
"""File that is opened -> its expectation; any one of several shards opens all."""

EVERY_TYPE: Schema = {
    "a_int": ("int32", [-1, 2]), "b_long": ("int64", [3]), "c_float": ("float32", [2, 2]),
    "d_double": ("float64", [-1]), "e_bytes": ("bytes", None), "f_text": ("string", None),
    "g_int": ("int32", None), "h_long": ("int64", None), "i_float": ("float32", None),
    "j_double": ("float64", None),
}  # fmt: skip


def every_type(random: np.random.Generator, row: int) -> dict[str, Any]:
    """A row of EVERY_TYPE, of integers of every width."""
    width = 1 << int(random.integers(0, 63))
    return {
        "a_int": random.integers(-(1 << 31), 1 << 31, size=(int(random.integers(0, 9)), 2))
        >> int(random.integers(0, 31)),
        "b_long": random.integers(-width, width, size=3),
        "c_float": random.normal(size=(2, 2)).astype(np.float32),
        "d_double": random.normal(size=int(random.integers(0, 5))),
        "e_bytes": random.bytes(int(random.integers(0, 20))),
        "f_text": "é中x" * int(random.integers(0, 120)),
        "g_int": int(random.integers(-(1 << 31), 1 << 31)) >> int(random.integers(0, 31)),
        "h_long": int(random.integers(-width, width)),
        "i_float": float(np.float32(random.normal())),
        "j_double": float(random.normal()) if row % 2 else float(row),
    }


def same(found: dict[str, Any], given: dict[str, Any], schema: Schema) -> bool:
    """Whether a row has the values and types that were written."""
    for name, (kind, shape) in schema.items():
        value = found[name]
        if kind in ("string", "bytes"):
            if value != given[name]:
                return False
        elif value.dtype != kind or not np.array_equal(value, given[name]) or (
            shape is not None and len(value.shape) != len(shape)
        ):  # fmt: skip
            return False
    return list(found) == sorted(schema)


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("mindrecord"))


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str, goldens: Path) -> None:
    known = expected(goldens, GOLDENS[name])
    reader = read_rows(goldens / name)
    found = [{key: plain(value) for key, value in row.items()} for row in reader.records()]
    assert len(reader) == known["rows"]
    assert list(found[0]) == known["columns"]
    assert found == known["values"]
    first = reader.record(0)
    for column, dtype in known["dtypes"].items():
        value = first[column]
        if isinstance(value, np.ndarray):
            assert value.dtype == dtype
            assert list(value.shape) == known["shapes_first"][column]


def test_a_file_of_the_default_sizes(goldens: Path, tmp_path: Path) -> None:
    known = expected(goldens, "default_sizes.mindrecord")
    reader = read_rows(unpack_default_sizes(tmp_path))
    found = [{key: plain(value) for key, value in row.items()} for row in reader.records()]
    assert found == known["values"]


def test_a_list_is_read_in_its_order(goldens: Path) -> None:
    known = expected(goldens, "list_order")
    records = find_records([str(goldens / name) for name in known["files"]])
    rows = [plain(row["input_ids"]) for row in open_records(records.headers).records()]
    assert rows == known["rows"]
    assert ["shards.mindrecord1" in note for note in records.notes] == [True]


def test_a_folder_is_read_in_the_order_of_complete_paths(tmp_path: Path) -> None:
    names = ["b/x.mindrecord", "a/y.mindrecord10", "a/y.mindrecord2", "a/n.mindrecord.db", "c.txt"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_mindrecord(tmp_path / name, TOKENS, token_rows([[number]]))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    for place in (tmp_path, tmp_path / "*" / "*.mindrecord*"):
        records = find_records([str(place)])
        rows = [plain(row["input_ids"]) for row in open_records(records.headers).records()]
        assert rows[:3] == [[1], [2], [0]]


REFUSED = {
    "empty": ("0 bytes",),
    "five_bytes": ("5 bytes",),
    "huge_header_len": ("1099511627776",),
    "truncated_header": ("100 bytes", "604"),
    "bad_json": ("cannot be parsed",),
    "bad_version": ("9.0", "3.0"),
    "truncated_blob": ("page 0",),
    "truncated_tail": ("page 1",),
}
ACCEPTED = ("missing_db", "empty_db", "garbage_db", "flipped_bit", "renamed")


@pytest.mark.parametrize("name", REFUSED)
def test_damage_is_an_error_with_the_file(name: str, goldens: Path) -> None:
    path = goldens / "damaged" / name / "wiki64.mindrecord"
    with pytest.raises(UserError) as error:
        find_records([str(path)])
    (problem,) = error.value.problems
    assert problem.where == str(path)
    assert problem.rule
    assert problem.advice
    assert all(part in str(problem) for part in REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_files_without_their_index_are_read(name: str, goldens: Path) -> None:
    known = expected(goldens, "wiki64.mindrecord")["values"]
    (path,) = (goldens / "damaged" / name).glob("*.mindrecord")
    records = find_records([str(path)])
    rows = [plain(row["input_ids"]) for row in open_records(records.headers).records()]
    equal = [row == value["input_ids"] for row, value in zip(rows, known, strict=True)]
    assert sum(equal) == (19 if name == "flipped_bit" else 20)
    assert bool(records.notes) == (name == "renamed")


def test_a_missing_shard_is_named_and_a_list_is_read_without_it(goldens: Path) -> None:
    files = sorted((goldens / "damaged" / "missing_shard").iterdir())
    with pytest.raises(UserError, match=r"shards\.mindrecord2"):
        find_records([str(files[0])])
    records = find_records([str(file) for file in files])
    assert records.rows == 14
    assert "shards.mindrecord2" in records.notes[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [("encrypted.mindrecord", "encrypted"), ("wiki46.mindrecord", "wiki64.mindrecord"),
     ("damaged/empty_db/*.db", "no MindRecord file")],
)  # fmt: skip
def test_other_files(name: str, text: str, goldens: Path) -> None:
    with pytest.raises(UserError, match=text):
        find_records([str(goldens / name)])


def test_files_of_different_columns(goldens: Path) -> None:
    with pytest.raises(UserError) as error:
        find_records([str(goldens / "wiki64.mindrecord"), str(goldens / "alpaca65.mindrecord")])
    assert error.value.problems[0].where.endswith("alpaca65.mindrecord")


def test_a_renamed_shard_does_not_find_its_family(goldens: Path, tmp_path: Path) -> None:
    other = shutil.copy(goldens / "shards.mindrecord1", tmp_path / "other.mindrecord")
    with pytest.raises(UserError) as error:
        find_records([str(other)])
    assert "shards.mindrecord1" in str(error.value)


def rows_of(schema: Schema, count: int, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [{name: value for name, value in every_type(random, row).items() if name in schema}
            for row in range(count)]  # fmt: skip


@pytest.mark.parametrize("version", ["2.0", "3.0"])
@pytest.mark.parametrize("columns", ["abcdefghij", "a", "fghij", "abcde", "e", "aj"])
def test_what_is_written_is_read(columns: str, version: str, tmp_path: Path) -> None:
    schema = {name: kind for name, kind in EVERY_TYPE.items() if name[0] in columns}
    given = rows_of(schema, 700)
    files = write_mindrecord(
        tmp_path / "x.mindrecord", schema, given, shards=3, version=version, header_size=65536
    )
    reader = read_rows(files[1])
    assert len(reader) == len(given)
    assert all(same(*pair, schema) for pair in zip(reader.records(), given, strict=True))
    for index in np.random.default_rng(1).integers(0, len(given), size=200).tolist():
        assert same(reader.record(index), given[index], schema)
    with pytest.raises(IndexError):
        reader.record(len(given))


def test_row_groups_share_raw_pages(tmp_path: Path) -> None:
    """Several blob pages to a raw page, and the other way round."""
    small = [{"t": "x", "v": np.arange(2000)} for _ in range(60)]
    large = [{"t": "x" * 9000, "v": np.arange(3)} for _ in range(20)]
    schema: Schema = {"t": ("string", None), "v": ("int32", [-1])}
    for number, given in enumerate((small, large)):
        (path,) = write_mindrecord(tmp_path / f"{number}.mindrecord", schema, given)
        groups = read_header(path).groups
        pages = {group.raw_page for group in groups}
        assert len(groups) > 4
        assert (len(pages) < len(groups)) == (number == 0)
        assert all(same(*pair, schema)
                   for pair in zip(read_rows(path).records(), given, strict=True))  # fmt: skip


def test_a_set_without_rows(tmp_path: Path) -> None:
    (path,) = write_mindrecord(tmp_path / "x.mindrecord", TOKENS, [])
    assert len(read_rows(path)) == 0
    assert list(read_rows(path).records()) == []


def test_tokens_for_other_tools(goldens: Path) -> None:
    token_arrays = required(TOKEN_READERS, "mindrecord", "tokens of MindRecord files")
    known = expected(goldens, "qwen_like.mindrecord")["values"]
    lines = list[str]()
    found = list(token_arrays([str(goldens / "qwen_like.mindrecord")], "input_ids", lines.append))
    assert [row.tolist() for row in found] == [row["input_ids"] for row in known]
    assert "not used: attention_mask, target_ids" in lines[0]
    with pytest.raises(UserError, match=r"row 0(.|\n)*token -100"):
        list(token_arrays([str(goldens / "qwen_like.mindrecord")], "target_ids", lines.append))
    with pytest.raises(UserError, match=r"which --column names(.|\n)*target_ids"):
        next(token_arrays([str(goldens / "qwen_like.mindrecord")], "target_id", lines.append))


LONG_BYTES = 206_000_000


@pytest.mark.long
def test_two_hundred_million_bytes(tmp_path: Path) -> None:
    """Varied files, at least 206 million bytes of used pages, read back equal."""
    total, seed = 0, 0
    shapes: Sequence[tuple[str, int, int, str]] = [
        ("abcdefghij", 3, 1 << 20, "3.0"), ("ab", 1, 1 << 22, "3.0"), ("fghij", 2, 32768, "2.0"),
        ("abcde", 11, 1 << 16, "2.0"), ("a", 1, 1 << 25, "3.0"),
    ]  # fmt: skip
    while total < LONG_BYTES:
        columns, shards, page_size, version = shapes[seed % len(shapes)]
        schema = {name: kind for name, kind in EVERY_TYPE.items() if name[0] in columns}
        given = list(_large_rows(schema, np.random.default_rng(seed)))
        files = write_mindrecord(
            tmp_path / f"{seed}.mindrecord", schema, given, shards=shards,
            header_size=1 << 22, page_size=page_size, version=version,
        )  # fmt: skip
        reader = read_rows(files[-1])
        assert all(same(*pair, schema) for pair in zip(reader.records(), given, strict=True))
        _check_random_access(reader, given, schema)
        total += sum(_used_bytes(file) for file in files)
        for file in files:
            file.unlink()
        seed += 1
    assert seed >= len(shapes)


def _large_rows(schema: Schema, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    for row in range(1500):
        values = every_type(random, row)
        if "a_int" in schema:
            shape = int(random.integers(0, 3000)), 2
            values["a_int"] = random.integers(-(1 << 31), 1 << 31, size=shape) >> random.integers(
                0, 31, size=shape
            )
        values["f_text"] = "long text, " * int(random.integers(0, 700))
        yield {name: values[name] for name in schema}


def _check_random_access(
    reader: RecordReader, given: Sequence[dict[str, Any]], schema: Schema
) -> None:
    for index in np.random.default_rng(9).integers(0, len(given), size=300).tolist():
        assert same(reader.record(index), given[index], schema)


def _used_bytes(file: Path) -> int:
    header = read_header(file)
    return sum(group.blob[1] - group.blob[0] for group in header.groups)
