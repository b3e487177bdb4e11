"""Which files a stream reads, and in which format: those that are read without streaming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError

from .streams import cached, equal, rows_of, stream, write_lines, write_parquet

PLAIN = {"shuffle": False, "packing": False}


def write_folder(folder: Path) -> Path:
    """Two formats, and one that is not streamed."""
    folder.mkdir()
    write_lines(folder / "a.jsonl", 0, 10)
    write_parquet(folder / "b.parquet", 10, 20)
    (folder / "c.csv").write_text("text\nhello\n")
    return folder


@pytest.mark.parametrize(("form", "rows"), [("json", 10), ("parquet", 10)])
def test_path_chooses_the_files_of_a_folder(tmp_path: Path, form: str, rows: int) -> None:
    folder = write_folder(tmp_path / "files")
    expected = cached([folder], tmp_path / "cached", path=form, **PLAIN)
    assert len(expected) == rows
    with stream([folder], tmp_path / "cache", path=form, **PLAIN) as dataset:
        assert equal(rows_of(dataset, 0, rows), rows_of(expected, 0, rows))


def test_path_is_the_format_of_other_names(tmp_path: Path) -> None:
    shard = write_parquet(tmp_path / "shard.parquet", 0, 20).rename(tmp_path / "shard.pq")
    expected = cached([shard], tmp_path / "cached", path="parquet", **PLAIN)
    with stream([shard], tmp_path / "cache", path="parquet", **PLAIN) as dataset:
        assert equal(rows_of(dataset, 0, 20), rows_of(expected, 0, 20))


def test_no_file_is_passed_over(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"c\.csv.*csv"),
        stream([write_folder(tmp_path / "files")], tmp_path / "cache"),
    ):
        pass


def test_an_empty_file_is_the_split_too(tmp_path: Path) -> None:
    write_folder(tmp_path / "files")
    (tmp_path / "files" / "train.jsonl").touch()
    with pytest.raises(UserError, match="empty"), stream([tmp_path / "files"], tmp_path / "cache"):
        pass


def test_a_name_that_contradicts_path_is_an_error(tmp_path: Path) -> None:
    shard = write_parquet(tmp_path / "a.parquet", 0, 10)
    with (
        pytest.raises(UserError, match="path"),
        stream([shard], tmp_path / "cache", path="json"),
    ):
        pass


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    columns = [pa.array(["one"]), pa.array(["two"])]
    write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with (
        pytest.raises(UserError, match="'text'"),
        stream([tmp_path / "a.parquet"], tmp_path / "cache"),
    ):
        pass


COLUMNS = {"instruction": "q", "output": "a", "input": "context"}


def write_questions(path: Path, with_context: int | None) -> Path:
    """20 records, one of which has the column `context`."""
    records: list[dict[str, Any]] = [{"q": f"question {n}", "a": "yes"} for n in range(20)]
    if with_context is not None:
        records[with_context]["context"] = "a ship"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("with_context", [0, 12])
def test_a_column_may_be_in_few_records(tmp_path: Path, with_context: int) -> None:
    """As with the cache: one of the file is enough."""
    shard = write_questions(tmp_path / "a.jsonl", with_context)
    settings = {"type": "InstructionDataLoader", "column_map": COLUMNS, "seq_length": 64} | PLAIN
    expected = cached([shard], tmp_path / "cached", **settings)
    with stream([shard], tmp_path / "cache", **settings) as dataset:
        assert equal(rows_of(dataset, 0, 40)[:20], rows_of(expected, 0, 20))


def test_a_column_that_no_record_has_is_said_and_ends_the_run(tmp_path: Path) -> None:
    """At once as a warning, after all records as an error."""
    shard = write_questions(tmp_path / "a.jsonl", None)
    lines: list[str] = []
    settings: dict[str, Any] = {"type": "InstructionDataLoader", "column_map": COLUMNS} | PLAIN
    with stream([shard], tmp_path / "cache", log=lines.append, seq_length=64, **settings) as rows:
        rows_of(rows, 0, 8)
        assert any("`context`" in line for line in lines)
        with pytest.raises(UserError, match="'context'"):
            rows_of(rows, 8, 21)
