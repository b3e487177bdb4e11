"""Mutated files of MindSpore: each is refused with a clear error, or read as what it says.

`make test` runs a sample, `make test-full` all. The seeds are in the names of the tests.
"""

from __future__ import annotations

import math
import random
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.mindspore.ckpt_values import DTYPES
from launcher.mindspore.protobuf_wire import varint
from launcher.mindspore.strategy_files import read_strategy
from launcher.weights.formats import header_of
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.reading.checksums import file_faults
from launcher.weights.source import Source, open_complete
from tests.mindspore.ckpt import GOLDEN, RANKS, STRATEGY
from tests.mindspore.golden import HERE
from tests.weights.content import content

MORE_MEMORY_KILOBYTES = 64 << 10
"""That a batch may add to the peak of the process: files have up to 14 KB."""
NUMBERS = (0, 1, 127, 128, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
WORDS = [b"Float32", b"Int4", b"str", b"crc_num", b"\xff\xfe", *(name.encode() for name in DTYPES)]


def flip(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    raw[rng.randrange(len(raw))] = rng.choice((0, 1, 0x0A, 0x12, 0x1A, 0x7F, 0x80, 0xFF))


def cut(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    del raw[rng.randrange(1, len(raw)) :]


def drop(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(raw))
    del raw[start : start + rng.choice((1, 2, 8, 64))]


def number(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(raw))
    raw[start : start + rng.choice((0, 1, 2))] = varint(rng.choice(NUMBERS))


def word(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    start, new = rng.randrange(len(raw)), rng.choice(WORDS)
    raw[start : start + rng.choice((0, len(new)))] = new


def repeat(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(raw))
    raw[start:start] = raw[start : start + rng.choice((2, 16, 99))] * rng.choice((1, 3))


def splice(rng: random.Random, raw: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    raw[rng.randrange(len(raw)) :] = other[rng.randrange(max(len(other), 1)) :]


MUTATIONS = (flip, flip, overwrite, overwrite, cut, drop, number, number, word, repeat, splice)


def mutated(rng: random.Random, originals: Sequence[bytes]) -> bytes:
    """One of the originals after a few changes, half of them near its start."""
    raw = bytearray(rng.choice(originals))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if len(raw) > 1:
            keep = rng.choice((len(raw), min(len(raw), 100)))
            head, tail = raw[:keep], raw[keep:]
            rng.choice(MUTATIONS)(rng, head, originals)
            raw = head + tail
    return bytes(raw)


def read_weights(path: Path) -> None:
    """Read all that a file of weights holds, and check it against the file."""
    header = header_of(path)
    for name, entry in header.entries.items():
        chunks = header.chunks.get(name)
        runs = [chunk.entry for chunk in chunks] if chunks else [entry]
        nbytes = sum(run.stop - run.start for run in runs)
        assert nbytes == math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        assert all(0 <= run.start <= run.stop <= header.file_bytes for run in runs)
    source: Source = open_complete(path)
    content(source.with_extras())
    file_faults(path)


def attempt(read: Callable[[Path], object], seed: int, count: int, origin: Sequence[Path],
            path: Path) -> int:  # fmt: skip
    """Read `count` mutated files. Returns how many were refused."""
    rng, originals, refused = random.Random(seed), [f.read_bytes() for f in origin], 0
    unclear: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(count):
        path.write_bytes(mutated(rng, originals))
        try:
            read(path)
        except UserError as error:
            refused += 1
            unclear += [str(error)] if not all(p.what and p.advice for p in error.problems) else []
        except Exception as error:
            raise AssertionError(f"seed {seed}, file {index}: {error!r}") from error
    assert unclear == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MEMORY_KILOBYTES
    return refused


CKPT = sorted([*GOLDEN.glob("*.ckpt"), *RANKS.rglob("*.ckpt")])
STRATEGIES = sorted([*STRATEGY.glob("*.ckpt"), *HERE.glob("*/ckpt_strategy_rank_*.ckpt")])
SAMPLE, ALL_OF_THEM = 150, 10_000


@pytest.mark.parametrize("seed", [1])
def test_a_sample_of_weights(seed: int, tmp_path: Path) -> None:
    assert 0 < attempt(read_weights, seed, SAMPLE, CKPT, tmp_path / "w.ckpt") < SAMPLE


@pytest.mark.parametrize("seed", [1])
def test_a_sample_of_strategies(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "ckpt_strategy_rank_0.ckpt"
    assert 0 < attempt(read_strategy, seed, SAMPLE, STRATEGIES, path) < SAMPLE


@pytest.mark.long
@pytest.mark.parametrize("seed", [2])
def test_weights(seed: int, tmp_path: Path) -> None:
    attempt(read_weights, seed, ALL_OF_THEM, CKPT, tmp_path / "w.ckpt")


@pytest.mark.long
@pytest.mark.parametrize("seed", [2])
def test_strategies(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "ckpt_strategy_rank_0.ckpt"
    attempt(read_strategy, seed, ALL_OF_THEM, STRATEGIES, path)
