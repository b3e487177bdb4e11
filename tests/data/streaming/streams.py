"""Streams of a test: shards of several kinds, and rows of a stream in this process."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.data.rows import Row, RowDataset
from launcher.data.streaming.build import MachineRanks, build_stream
from launcher.data.streaming.worker import ThreadProducer
from tests.data.conftest import train_tokenizer

TOKENIZER = train_tokenizer()


def texts(begin: int, end: int) -> list[str]:
    """Documents of different lengths."""
    return [f"document {n} " + "the ship slides " * (n * 7 % 5 + 1) for n in range(begin, end)]


def write_lines(path: Path, begin: int, end: int) -> Path:
    """A shard of JSON lines, compressed where it is called so; a blank line now and then."""
    lines = [json.dumps({"text": text}) + ("\n\n" if n % 7 == 3 else "\n")
             for n, text in enumerate(texts(begin, end))]  # fmt: skip
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, begin: int, end: int, group: int = 16) -> Path:
    """A shard of Parquet, with row groups of `group` rows and one more column."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    table = pa.table({"id": list(range(begin, end)), "text": texts(begin, end)})
    write_table(table, path, row_group_size=group)
    return path


def write_shards(folder: Path) -> list[Path]:
    """120 records in three shards, one of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_lines(folder / "a.jsonl", 0, 50),
        write_lines(folder / "b.jsonl.gz", 50, 85),
        write_parquet(folder / "c.parquet", 85, 120),
    ]


def section_of(places: list[Any], **settings: Any) -> DatasetSection:
    """An HFDataLoader of `places` with streaming."""
    packing = settings.pop("packing", True)
    given = {"type": "HFDataLoader", "streaming": True, "shuffle_buffer": 8} | settings
    files = [str(place) for place in places]
    return DatasetSection(
        data_loader=DataLoaderSection(dataset_files=files, **given), packing=packing
    )


@contextmanager
def stream(
    places: list[Any],
    cache_dir: Path,
    *,
    seed: int = 5,
    log: Any = lambda line: None,
    tokenizer: Any = TOKENIZER,
    open_shard: Any = None,
    seq_length: int = 16,
    **settings: Any,
) -> Iterator[RowDataset]:
    """A stream of one rank, produced in a thread. `open_shard`: opens shards instead of their own
    function."""
    seams = {"open_shard": open_shard} if open_shard else {}
    dataset = build_stream(
        section_of(places, **settings),
        tokenizer=tokenizer,
        seq_length=seq_length,
        cache_dir=cache_dir,
        seed=seed,
        once=lambda prepare: prepare(),
        machine=MachineRanks(once=lambda prepare: prepare()),
        log=log,
        start=lambda production, log: ThreadProducer(production, log, **seams),
    )
    try:
        yield dataset
    finally:
        assert dataset.stream is not None
        dataset.stream.close()


def cached(
    places: list[Any], cache_dir: Path, *, seq_length: int = 16, **settings: Any
) -> RowDataset:
    """The same section without streaming."""
    section = section_of(places, **(settings | {"streaming": False}))
    return build_dataset(
        section, tokenizer=TOKENIZER, seq_length=seq_length, cache_dir=cache_dir,
        once=lambda prepare: prepare(), log=lambda line: None,
    )  # fmt: skip


def rows_of(dataset: RowDataset, begin: int, end: int) -> list[Row]:
    """Rows in the way of a run: counted, then read."""
    found = []
    for number in range(begin, end):
        counts = dataset.counts(np.array([number], dtype=np.int64))
        row = dataset.row(number)
        assert counts.targets[0] == np.count_nonzero(row.labels != -100)
        found.append(row)
    return found


def equal(left: list[Row], right: list[Row]) -> bool:
    """Whether rows are equal, field by field."""
    return len(left) == len(right) and all(
        (a is None and b is None) or np.array_equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )
