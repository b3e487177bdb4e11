"""Where blocks begin: their division, the journal, and waiting for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.streaming import index, rows
from launcher.data.streaming.index import index_source
from launcher.data.streaming.rows import Journal, StreamingRows
from launcher.data.streaming.shards import find_shards

from .streams import cached, equal, rows_of, section_of, stream, write_lines, write_parquet


def blocks_of(shard: Path, cache: Path, size: int = 1000) -> np.ndarray:
    shards = find_shards(section_of([shard]).loaders["data_loader"])
    return index_source(shards, size, None, cache, print)[0].blocks


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_large_records_end_a_block_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    shard = write(tmp_path / ("a.jsonl" if write is write_lines else "a.parquet"), 0, 100)
    monkeypatch.setattr(index, "BLOCK_BYTES", 400)
    blocks = blocks_of(shard, tmp_path)
    assert blocks["records"].sum() == 100
    assert len(blocks) > 1
    assert blocks["records"].max() < 20
    assert np.array_equal(blocks["first"], np.cumsum(blocks["records"]) - blocks["records"])
    with stream([shard], tmp_path / "cache", shuffle=False, packing=False) as dataset:
        expected = cached([shard], tmp_path / "c", packing=False)
        assert equal(rows_of(dataset, 0, 100), [expected.row(n) for n in range(100)])


def test_an_index_is_made_once_for_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 50)
    first = blocks_of(shard, tmp_path, 7)
    monkeypatch.setattr(index, "_index_lines", lambda *_: pytest.fail("indexed again"))
    assert np.array_equal(blocks_of(shard, tmp_path, 7), first)
    monkeypatch.undo()
    write_lines(shard, 0, 60)
    assert blocks_of(shard, tmp_path, 7)["records"].sum() == 60
    for path in (tmp_path / index.FOLDER).iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert blocks_of(shard, tmp_path, 7)["records"].sum() == 60


def test_a_journal_survives_torn_and_double_entries(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    assert journal.nearest(10**9) == (0, 0)
    for block, first in ((1, 10), (2, 10), (3, 25), (2, 10), (7, 90)):
        journal.add(block, first)
    found = Journal(path)
    assert [found.nearest(row) for row in (0, 9, 10, 24, 25, 89, 90, 10**9)] == [
        (0, 0), (0, 0), (2, 10), (2, 10), (3, 25), (3, 25), (7, 90), (7, 90),
    ]  # fmt: skip
    size = path.stat().st_size
    found.add(3, 25)
    assert path.stat().st_size == size
    content = path.read_bytes()
    path.write_bytes(content[:24] + b"\0" * 24 + content[48:] + b"torn")
    damaged = Journal(path)
    assert damaged.nearest(30) == (3, 25)
    path.write_bytes(content[:-30])
    assert Journal(path).nearest(10**9) == (3, 25)
    Journal(tmp_path / "absent" / "journal").add(1, 1)  # is not written, and no error


def test_a_journal_gives_positions_to_a_later_run(tmp_path: Path) -> None:
    """As with data_skip_steps: without a cursor."""
    shard = write_lines(tmp_path / "a.jsonl", 0, 300)
    with stream([shard], tmp_path / "cache") as dataset:
        through = rows_of(dataset, 0, 260)
    with stream([shard], tmp_path / "cache") as dataset:
        assert equal(rows_of(dataset, 250, 260), through[250:])
        assert isinstance(dataset.rows, StreamingRows)
        assert dataset.rows._base > 5
    with stream([shard], tmp_path / "new") as dataset:  # by way of all blocks before
        assert equal(rows_of(dataset, 250, 260), through[250:])
        assert isinstance(dataset.rows, StreamingRows)
        assert dataset.rows._base == 0


def test_who_waits_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MESSAGE_SECONDS", 0.0)
    shard = write_lines(tmp_path / "a.jsonl", 0, 20)
    said = threading.Event()
    logged: list[str] = []

    def log(line: str) -> None:
        logged.append(line)
        if "waiting" in line:
            said.set()

    def open_shard(found: Any) -> Any:
        said.wait()
        return found.ranges()

    with stream([shard], tmp_path / "cache", log=log, open_shard=open_shard) as dataset:
        rows_of(dataset, 0, 1)
    assert any("waiting for data: block 0" in line for line in logged)


def test_indexing_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of a shard too, whose end may be hours away."""
    monkeypatch.setattr(index, "PROGRESS_SECONDS", 0.0)
    write_lines(tmp_path / "a.jsonl", 0, 100)
    write_lines(tmp_path / "b.jsonl.gz", 0, 100)
    shards = find_shards(section_of([tmp_path / "*.jsonl*"]).loaders["data_loader"])
    logged: list[str] = []
    index_source(shards, 10, None, tmp_path / "cache", logged.append)
    assert len(logged) >= 20
    assert all(line.startswith("indexing: ") for line in logged)
