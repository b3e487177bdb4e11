"""Streams: exact rows, at any position, on any number of ranks, with bounded disk and memory."""

from __future__ import annotations

import gzip
import os
import socket
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.loader import Loader
from launcher.data.rows import RowDataset
from launcher.data.streaming import gzip_members
from launcher.data.streaming.build import MachineRanks, build_stream
from launcher.data.streaming.index import index_source
from launcher.data.streaming.order import BlockOrder, StreamOrder
from launcher.data.streaming.ranges import Ranges
from launcher.data.streaming.ring import ABANDONED_SECONDS
from launcher.data.streaming.rows import StreamingRows
from launcher.data.streaming.shards import Shard, find_shards
from launcher.data.streaming.worker import ThreadProducer
from launcher.parallel.filesystems import ONE_FILESYSTEM
from launcher.parallel.world import World
from tests.checkpoint.crew import together

from .streams import (
    TOKENIZER,
    cached,
    equal,
    rows_of,
    section_of,
    stream,
    write_lines,
    write_shards,
)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards")


class Recorder:
    """Opens shards, and counts the bytes that are read of each."""

    def __init__(self) -> None:
        self.read: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, shard: Shard) -> Ranges:
        ranges, reads = shard.ranges(), self.read.setdefault(Path(shard.name).name, [])

        class Recorded:
            name, size = ranges.name, ranges.size

            def read(self, start: int, stop: int) -> bytes:
                reads.append((start, stop))
                return ranges.read(start, stop)

            def check_unchanged(self) -> None:
                ranges.check_unchanged()

        return Recorded()


def streaming_rows(dataset: RowDataset) -> StreamingRows:
    assert isinstance(dataset.rows, StreamingRows)
    return dataset.rows


def test_rows_are_those_of_the_cache(shards: list[Path], tmp_path: Path) -> None:
    """In the order of the files; packed, where a block is a shard."""
    with stream(shards, tmp_path / "cache", shuffle=False, packing=False) as dataset:
        expected = cached(shards, tmp_path / "other", shuffle=False, packing=False)
        found = rows_of(dataset, 0, 2 * len(expected))
    whole = [expected.row(index) for index in range(len(expected))]
    assert equal(found, whole + whole)
    shard = shards[:1]
    with stream(shard, tmp_path / "cache", shuffle=False, shuffle_buffer=1000) as dataset:
        expected = cached(shard, tmp_path / "other", shuffle=False)
        found = rows_of(dataset, 0, len(expected))
    assert equal(found, [expected.row(index) for index in range(len(expected))])


def test_an_epoch_has_every_record_once_in_an_order_of_its_own(
    shards: list[Path], tmp_path: Path
) -> None:
    def ids(rows: list[Any]) -> list[bytes]:
        return [row.input_ids.tobytes() for row in rows]

    with stream(shards, tmp_path / "cache", packing=False) as dataset:
        first, second = ids(rows_of(dataset, 0, 120)), ids(rows_of(dataset, 120, 240))
    with stream(shards, tmp_path / "cache", packing=False, seed=6) as dataset:
        other = ids(rows_of(dataset, 0, 120))
    in_order = [cached(shards, tmp_path / "c", packing=False).row(n) for n in range(120)]
    assert sorted(first) == sorted(second) == sorted(other) == sorted(ids(in_order))
    assert len({tuple(order) for order in (first, second, other, ids(in_order))}) == 4


@pytest.mark.parametrize("packing", [True, False])
def test_any_position_is_resumed_from_its_cursor(
    shards: list[Path], tmp_path: Path, packing: bool
) -> None:
    """On a machine without the cache, in the middle of an epoch and in a later one."""
    with stream(shards, tmp_path / "cache", packing=packing) as dataset:
        through = rows_of(dataset, 0, 300)
        positions = (0, 1, 17, 120, 211, 299)
        cursors = [streaming_rows(dataset).cursor(position) for position in positions]
    for number, (position, cursor) in enumerate(zip(positions, cursors, strict=True)):
        with stream(shards, tmp_path / f"new{number}", packing=packing) as dataset:
            streaming_rows(dataset).seek(cursor)
            assert equal(rows_of(dataset, position, 300), through[position:])
            assert not dataset.stream or streaming_rows(dataset).cursor(position) == cursor


def test_a_resume_reads_nothing_of_earlier_blocks(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 400)
    [index] = index_source(
        find_shards(section_of([shard]).loaders["data_loader"]), 8, None, tmp_path, print
    )
    with stream([shard], tmp_path / "cache") as dataset:
        through = rows_of(dataset, 0, 310)
        cursor = streaming_rows(dataset).cursor(300)
    recorder = Recorder()
    with stream([shard], tmp_path / "new", open_shard=recorder) as dataset:
        streaming_rows(dataset).seek(cursor)
        assert equal(rows_of(dataset, 300, 310), through[300:])
    order = BlockOrder([index], 5, shuffle=True)
    later = [order.block(n).entry for n in range(cursor["block"], cursor["block"] + 400)]
    allowed = {(int(entry["start"]), int(entry["stop"])) for entry in later[:35]}
    assert cursor["block"] > 10
    assert recorder.read["a.jsonl"]
    assert set(recorder.read["a.jsonl"]) <= allowed
    # Without the cursor the journal of the first cache serves as well.
    recorder = Recorder()
    with stream([shard], tmp_path / "cache", open_shard=recorder) as dataset:
        assert equal(rows_of(dataset, 300, 310), through[300:])
    assert set(recorder.read["a.jsonl"]) <= allowed


def test_a_member_of_gzip_is_where_reading_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_members, "MEMBER_DISTANCE", 2000)
    lines = write_lines(tmp_path / "a.jsonl", 0, 400).read_bytes()
    parts = [lines[at : at + 1000] for at in range(0, len(lines), 1000)]
    shard = tmp_path / "b.jsonl.gz"
    shard.write_bytes(b"\0\0".join(map(gzip.compress, parts)) + b"\0" * 100)
    with stream([tmp_path / "a.jsonl"], tmp_path / "cache", shuffle=False) as plain:
        expected = rows_of(plain, 0, 400)
        cursor = streaming_rows(plain).cursor(390)
    recorder = Recorder()
    with stream([shard], tmp_path / "cache", shuffle=False, open_shard=recorder) as dataset:
        streaming_rows(dataset).seek(cursor)
        assert equal(rows_of(dataset, 390, 400), expected[390:])
    first_read = recorder.read["b.jsonl.gz"][0]  # later ones may be of the next epoch
    assert first_read[0] > shard.stat().st_size // 2


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_one_producer_and_its_rows(
    shards: list[Path], tmp_path: Path, ranks: int
) -> None:
    def work(world: World) -> list[torch.Tensor]:
        dataset = build_stream(
            section_of(shards), tokenizer=TOKENIZER, seq_length=16, cache_dir=tmp_path / "cache",
            seed=5, log=print,
            once=lambda prepare: str(ONE_FILESYSTEM.on_own(world, "", prepare)),
            machine=MachineRanks(
                once=lambda prepare: str(ONE_FILESYSTEM.on_own(world, "", prepare)),
                number=world.rank, count=world.size,
            ),
            start=ThreadProducer,
        )  # fmt: skip
        loader = Loader(
            dataset, StreamOrder(5), batch_size=8 // ranks, micro_steps=1, data_parallel=ranks,
            data_rank=world.rank,
        )  # fmt: skip
        steps = [loader.step(8 * step) for step in range(20)]
        world.barrier()
        loader.close()
        assert all(step.target_tokens > 0 for step in steps)
        return [step.batches[0].input_ids for step in steps]

    found = together(ranks, work)
    batches = [torch.cat(parts) for parts in zip(*found, strict=True)]
    with stream(shards, tmp_path / "one") as dataset:
        rows = rows_of(dataset, 0, 160)
    assert torch.equal(torch.cat(batches), torch.from_numpy(np.stack([r.input_ids for r in rows])))
    assert not list((tmp_path / "cache").rglob("ring-*"))


def test_going_back_makes_blocks_again(shards: list[Path], tmp_path: Path) -> None:
    """As a roll-back does."""
    with stream(shards, tmp_path / "cache") as dataset:
        through = rows_of(dataset, 0, 200)
        assert equal(rows_of(dataset, 40, 200), through[40:])
        many = np.array([150, 20, 151], dtype=np.int64)
        assert dataset.counts(many).tokens.tolist() == [
            dataset.counts(many[at : at + 1]).tokens[0] for at in range(3)
        ]


def test_two_runs_share_a_cache_folder(shards: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with stream(shards, cache) as one, stream(shards, cache) as other:
        assert len(list(cache.glob("stream-*/ring-*"))) == 2
        assert one.fingerprint == other.fingerprint
        assert equal(rows_of(one, 0, 100), rows_of(other, 0, 100))


def test_rings_of_killed_jobs_are_deleted(shards: list[Path], tmp_path: Path) -> None:
    """Those of any stream; of another machine, whose locks may be unknown here, when they are
    old."""
    cache = tmp_path / "cache"
    old = time.time() - 2 * ABANDONED_SECONDS
    rings = {}
    for host, is_old in (("here", False), ("there", False), ("there", True)):
        ring = cache / f"stream-{host}" / f"ring-{is_old}"
        ring.mkdir(parents=True)
        (ring / "owner.lock").write_text(socket.gethostname() if host == "here" else "another")
        if is_old:
            os.utime(ring, (old, old))
        rings[host, is_old] = ring
    with stream(shards, cache), stream(shards, cache):  # the first one is in use
        found = [key for key, ring in rings.items() if ring.exists()]
        assert found == [("there", False)]
        assert len(list(cache.glob("stream-*/ring-*"))) == 3


def test_shards_elsewhere_are_the_same_data(shards: list[Path], tmp_path: Path) -> None:
    moved = write_shards(tmp_path / "moved")
    with stream(shards, tmp_path / "c") as one, stream(moved, tmp_path / "d") as other:
        assert one.fingerprint == other.fingerprint
    for changes in ({"seed": 6}, {"shuffle": False}):  # which the metadata of a run compares
        with stream(shards, tmp_path / "c", **changes) as other:  # type: ignore[arg-type]
            assert one.fingerprint == other.fingerprint
    for changes in ({"shuffle_buffer": 9}, {"num_samples": 90}, {"packing": False}):
        with stream(shards, tmp_path / "c", **changes) as other:  # type: ignore[arg-type]
            assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("limit", [3, 8, 50, 57, 90, 120, 500])
def test_num_samples_are_the_first_records(shards: list[Path], tmp_path: Path, limit: int) -> None:
    with stream(shards, tmp_path / "cache", packing=False, num_samples=limit) as dataset:
        count = min(limit, 120)
        rows = rows_of(dataset, 0, 2 * count)
    expected = cached(shards, tmp_path / "c", packing=False, num_samples=limit)
    assert len(expected) == count
    wanted = sorted(expected.row(index).input_ids.tobytes() for index in range(count))
    for part in (rows[:count], rows[count:]):
        assert sorted(row.input_ids.tobytes() for row in part) == wanted


def test_disk_and_memory_stay_bounded(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 1500)
    sizes: list[int] = []
    gigabytes = 20_000 / 2**30
    with stream([shard], tmp_path / "cache", streaming_cache_gb=gigabytes) as dataset:
        ring = next((tmp_path / "cache").glob("stream-*/ring-*"))
        rows_of(dataset, 0, 200)
        tracemalloc.start()
        for begin in range(200, 1000, 100):
            rows_of(dataset, begin, begin + 100)
            blocks = [path for path in ring.iterdir() if path.name.isdecimal()]
            sizes.append(sum(_size(path) for path in blocks))
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(streaming_rows(dataset)._opened) < 5
    assert max(sizes) <= 20_000
    assert grown < 2_000_000


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:  # deleted meanwhile
        return 0


def test_the_order_never_changes(shards: list[Path], tmp_path: Path) -> None:
    """Golden values: runs that are resumed depend on them."""
    loader = section_of(shards).loaders["data_loader"]
    source = index_source(find_shards(loader), 8, None, tmp_path, print)
    order = BlockOrder(source, 5, shuffle=True)
    assert [[*order.epoch(epoch)] for epoch in (0, 1)] == GOLDEN_EPOCHS
    assert [*order.records(order.block(3), 3, 8)] == GOLDEN_RECORDS
    in_order = BlockOrder(source, 5, shuffle=False)
    assert [in_order.block(n).number for n in range(19)] == [*range(17), 0, 1]


GOLDEN_EPOCHS = [
    [2, 1, 5, 16, 4, 14, 6, 3, 15, 7, 12, 0, 8, 13, 9, 10, 11],
    [7, 2, 4, 12, 16, 3, 14, 0, 8, 13, 15, 9, 10, 11, 6, 5, 1],
]
GOLDEN_RECORDS = [6, 3, 4, 7, 1, 2, 0, 5]


def test_a_segment_is_read_in_order(shards: list[Path], tmp_path: Path) -> None:
    loader = section_of(shards).loaders["data_loader"]
    source = index_source(find_shards(loader), 8, None, tmp_path, print)
    order = BlockOrder(source, 5, shuffle=True)
    for epoch in range(20):
        numbers = order.epoch(epoch)
        assert sorted(numbers) == [*range(17)]
        segments: dict[Any, list[int]] = {}
        for number in numbers:
            block = order._of_source(int(number))
            key = (block.index.shard.name, int(block.entry["segment"]))
            segments.setdefault(key, []).append(int(number))
        assert all(found == sorted(found) for found in segments.values())
