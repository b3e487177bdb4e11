"""What goes wrong in a stream: named with its place, on every rank, when the rows are needed."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.streaming.build import MachineRanks, build_stream
from launcher.data.streaming.producer import Production
from launcher.data.streaming.ring import Ring
from launcher.data.streaming.rows import StreamingRows
from launcher.data.streaming.worker import ProcessProducer, ThreadProducer
from launcher.errors import UserError
from launcher.parallel.filesystems import ONE_FILESYSTEM
from launcher.parallel.world import World
from tests.checkpoint.crew import together
from tests.data.conftest import CHATML, train_tokenizer

from .streams import (
    TOKENIZER,
    equal,
    rows_of,
    section_of,
    stream,
    texts,
    write_lines,
    write_parquet,
)


def lines_of(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_a_wrong_record_is_named_when_its_block_is_needed(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 300)
    lines = shard.read_text().splitlines()
    lines[250] = '{"text": 7}'
    lines[252] = "{"
    shard.write_text("\n".join(lines))
    with stream([shard], tmp_path / "cache", shuffle=False) as dataset:
        rows_of(dataset, 0, 100)
        with pytest.raises(UserError) as caught:
            rows_of(dataset, 100, 1000)
    assert [problem.where for problem in caught.value.problems] == [f"{shard}:251", f"{shard}:253"]


def test_a_wrong_record_of_parquet_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    raw = [text.encode() for text in texts(0, 60)]
    raw[45] = b"\xff\xfe broken"
    column = pa.array(raw, type=pa.binary()).view(pa.string())
    shard = tmp_path / "a.parquet"
    write_table(pa.table({"text": column}), shard, row_group_size=20)
    with (
        stream([shard], tmp_path / "cache", shuffle=False, packing=False) as dataset,
        pytest.raises(UserError) as caught,
    ):
        rows_of(dataset, 0, 61)
    assert f"{shard}, record 46" in str(caught.value)
    assert "0xff" in str(caught.value)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_missing_column_is_found_in_any_block(tmp_path: Path, form: str) -> None:
    write = write_lines if form == "jsonl" else write_parquet
    shard = write(tmp_path / f"a.{form}", 0, 100)
    with stream([shard], tmp_path / "cache", text_column="test") as dataset:
        with pytest.raises(UserError) as caught:
            rows_of(dataset, 0, 1)
        assert "did you mean `text`?" in str(caught.value)
        assert str(shard) in str(caught.value)


def change_a_byte(shard: Path) -> None:
    status = shard.stat()
    content = bytearray(shard.read_bytes())
    content[content.index(b"ship")] = ord("w")
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a careless copy would


CHANGES = {
    "removed": (Path.unlink, "cannot be read"),
    "longer": (lambda shard: write_lines(shard, 0, 3001), "has changed"),
    "one byte": (change_a_byte, "has changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_during_a_run(tmp_path: Path, change: str) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 3000)
    act, message = CHANGES[change]
    with stream([shard], tmp_path / "cache", shuffle=False) as dataset:
        rows_of(dataset, 0, 10)
        act(shard)
        with pytest.raises(UserError) as caught:
            rows_of(dataset, 10, 100_000)
    assert message in str(caught.value)
    assert str(shard) in str(caught.value)


def test_every_rank_gets_the_error_of_the_producer(tmp_path: Path) -> None:
    shard = lines_of(tmp_path / "a.jsonl", [{"text": text} for text in texts(0, 40)] + ["wrong"])

    def work(world: World) -> str:
        def once(prepare: Any) -> str:
            return str(ONE_FILESYSTEM.on_own(world, "", prepare))

        dataset = build_stream(
            section_of([shard], shuffle=False), tokenizer=TOKENIZER, seq_length=16,
            cache_dir=tmp_path / "cache", seed=5, log=print, once=once,
            machine=MachineRanks(once=once, number=world.rank, count=world.size),
            start=ThreadProducer,
        )  # fmt: skip
        with pytest.raises(UserError) as caught:
            rows_of(dataset, 0, 1000)
        world.barrier()
        assert dataset.stream is not None
        dataset.stream.close()
        return str(caught.value)

    messages = together(3, work)
    assert len(set(messages)) == 1
    assert f"{shard}:41: is a string" in messages[0]


def test_a_producer_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    """The process of a real one; before, its rows are those of a thread."""
    shard = write_lines(tmp_path / "a.jsonl", 0, 200)
    dataset = build_stream(
        section_of([shard]), tokenizer=TOKENIZER, seq_length=16, cache_dir=tmp_path / "cache",
        seed=5, once=lambda prepare: prepare(), log=print,
        machine=MachineRanks(once=lambda prepare: prepare()),
    )  # fmt: skip
    rows = dataset.rows
    assert isinstance(rows, StreamingRows)
    found = rows_of(dataset, 0, 20)
    with stream([shard], tmp_path / "other") as other:
        for one, same in zip(found, rows_of(other, 0, 20), strict=True):
            assert np.array_equal(one.input_ids, same.input_ids)
    assert isinstance(rows._producer, ProcessProducer)
    rows._producer.process.kill()
    with pytest.raises(UserError, match="ended with signal 9"):
        rows_of(dataset, 20, 10_000)
    rows.close()
    assert not list((tmp_path / "cache").rglob("ring-*"))


def test_a_fault_of_the_program_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("launcher.data.loaders.text.tokenize_documents", broken)
    shard = write_lines(tmp_path / "a.jsonl", 0, 20)
    logged: list[str] = []
    with stream([shard], tmp_path / "cache", log=logged.append) as dataset:
        with pytest.raises(RuntimeError, match="a bug"):
            rows_of(dataset, 0, 1)
        assert any("Traceback" in line for line in logged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}]', "JSON list"),
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        (b"", "empty"),
        (b"\n \n", "no record"),
    ],
)
def test_files_that_cannot_be_streamed(tmp_path: Path, content: bytes, message: str) -> None:
    shard = tmp_path / "a.json"
    shard.write_bytes(content)
    with pytest.raises(UserError, match=message), stream([shard], tmp_path / "cache"):
        pass


def test_damaged_files_are_found_before_training(tmp_path: Path) -> None:
    short = write_lines(tmp_path / "a.jsonl.gz", 0, 300)
    short.write_bytes(short.read_bytes()[:-20])
    not_gzip = tmp_path / "b.jsonl.gz"
    not_gzip.write_text('{"text": "a"}\n')
    not_parquet = tmp_path / "c.parquet"
    not_parquet.write_bytes(b"PAR1" + bytes(100))
    for shard in (short, not_gzip, not_parquet):
        with pytest.raises(UserError) as caught, stream([shard], tmp_path / "cache"):
            pass
        assert str(shard) in str(caught.value)


def test_data_without_a_row_end_the_run(tmp_path: Path) -> None:
    shard = lines_of(tmp_path / "a.jsonl", [{"text": " "}] * 20)
    with (
        stream([shard], tmp_path / "cache") as dataset,
        pytest.raises(UserError, match="nothing to train on"),
    ):
        rows_of(dataset, 0, 1)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    values: list[Any] = [{"text": text} for text in texts(0, 30)]
    values[12] = {"other": "no text"}
    shard = lines_of(tmp_path / "a.jsonl", values)
    logged: list[str] = []
    with stream([shard], tmp_path / "cache", log=logged.append, packing=False) as dataset:
        rows_of(dataset, 0, 29)
    assert any("1 record(s) have no text" in line and f"{shard}:13" in line for line in logged)


def test_conversations_of_every_block_have_the_format_of_the_file(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML
    records = [{"instruction": f"What is {n}?", "output": f"The number {n}."} for n in range(40)]
    shard = lines_of(tmp_path / "a.jsonl", records)
    settings: dict[str, Any] = {
        "type": "InstructionDataLoader",
        "tokenizer": tokenizer,
        "packing": False,
    }
    settings |= {"seq_length": 64}
    with stream([shard], tmp_path / "cache", **settings) as dataset:
        rows = rows_of(dataset, 0, 40)
        assert len({row.input_ids.tobytes() for row in rows}) == 40
    lines_of(shard, [*records[:30], {"messages": [{"role": "user", "content": "hello"}]}])
    with (
        stream([shard], tmp_path / "cache", **settings) as dataset,
        pytest.raises(UserError) as caught,
    ):
        rows_of(dataset, 0, 40)
    assert f"{shard}:31" in str(caught.value)
    assert "alpaca" in str(caught.value)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_columns_are_mapped(tmp_path: Path, form: str) -> None:
    """As the cache does; a wrong name is found in any block."""
    write = write_lines if form == "jsonl" else write_parquet
    shard = write(tmp_path / f"a.{form}", 0, 60)
    plain = {"shuffle": False, "packing": False}
    renamed = tmp_path / f"b.{form}"
    if form == "jsonl":
        renamed.write_text(shard.read_text().replace('"text"', '"body"'))
    else:
        import pyarrow.parquet as pq

        pq.write_table(pq.read_table(shard).rename_columns(["id", "body"]), renamed)
    with stream([shard], tmp_path / "cache", **plain) as dataset:
        expected = rows_of(dataset, 0, 60)
    with stream([renamed], tmp_path / "c", column_map={"text": "body"}, **plain) as dataset:
        assert equal(rows_of(dataset, 0, 60), expected)
    with (
        stream([renamed], tmp_path / "d", column_map={"text": "bodies"}) as dataset,
        pytest.raises(UserError, match="bodies"),
    ):
        rows_of(dataset, 0, 1)


def test_a_ring_that_is_deleted_ends_the_run(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 600)
    with stream([shard], tmp_path / "cache", shuffle_buffer=1) as dataset:
        rows_of(dataset, 0, 1)
        ring = next((tmp_path / "cache").glob("stream-*/ring-*"))
        ring.rename(tmp_path / "gone")
        with pytest.raises(UserError, match="deleted"):
            rows_of(dataset, 1, 600)


def test_a_block_that_is_deleted_is_made_again(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 100)
    with stream([shard], tmp_path / "other") as dataset:
        expected = rows_of(dataset, 0, 40)
    with stream([shard], tmp_path / "cache") as dataset:
        rows_of(dataset, 0, 1)
        ring = next((tmp_path / "cache").glob("stream-*/ring-*"))
        for block in ring.glob("0*"):
            block.rename(tmp_path / block.name)
        assert equal(rows_of(dataset, 0, 40), expected)


def test_whoever_waits_gives_up_when_the_stream_is_closed(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", 0, 20)

    class Nothing:
        def error(self) -> None: ...
        def close(self) -> None: ...

    def start(production: Production, log: Any) -> Nothing:
        closing.set()
        return Nothing()

    closing = threading.Event()
    dataset = build_stream(
        section_of([shard]), tokenizer=TOKENIZER, seq_length=16, cache_dir=tmp_path / "cache",
        seed=5, once=lambda prepare: prepare(), log=print,
        machine=MachineRanks(once=lambda prepare: prepare()), start=start,
    )  # fmt: skip
    rows = dataset.rows
    assert isinstance(rows, StreamingRows)

    def close() -> None:
        closing.wait()
        rows.close()

    thread = threading.Thread(target=close)
    thread.start()
    with pytest.raises(RuntimeError, match="closed"):
        rows.row(0)
    thread.join()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr("launcher.data.build.write_array", full)
    shard = write_lines(tmp_path / "a.jsonl", 0, 20)
    with stream([shard], tmp_path / "cache", packing=False) as dataset:
        with pytest.raises(UserError, match="No space left") as caught:
            rows_of(dataset, 0, 1)
        assert "streaming_cache_gb" in str(caught.value)
        monkeypatch.setattr(Ring, "error", lambda ring: None)  # it could not be written either
        with pytest.raises(RuntimeError, match="producer has ended"):
            rows_of(dataset, 0, 1)
