"""Mutated MindRecord files: refused with a clear error, or read as what they say.

`make test` runs a sample, `make test-full` all. The seeds are in the names of the tests.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.errors import UserError
from launcher.mindspore.mindrecord.checks import problems
from launcher.mindspore.mindrecord.integers import NotNarrowed, narrowed
from launcher.mindspore.mindrecord.msgpack import NotMsgpack, unpack_map
from launcher.mindspore.mindrecord.reader import read_rows
from tests.data.mindrecord_writer import HEADER_SIZE, narrow, pack, write_mindrecord
from tests.mindspore.test_mindrecord import EVERY_TYPE, rows_of

MORE_MEMORY_KILOBYTES = 64 << 10
"""That a batch may add to the peak of the process: files have up to 100 KB."""
NUMBERS = (-1, 0, 1, 7, 8, 255, 16384, 1 << 31, (1 << 63) - 1, 1 << 64, 1.5, None, "3.0", [], {},
           True, [0], {"id": 0})  # fmt: skip
Mutation = Callable[[random.Random, bytearray], None]


def _header(raw: bytearray) -> bytes:
    (length,) = struct.unpack_from("<Q", raw)
    return bytes(raw[8 : 8 + length])


def _replace_header(raw: bytearray, text: bytes) -> None:
    raw[: 8 + len(text)] = struct.pack("<Q", len(text)) + text


def flip(rng: random.Random, raw: bytearray) -> None:
    """A bit anywhere that is used."""
    raw[_used(rng, raw)] ^= 1 << rng.randrange(8)


def number(rng: random.Random, raw: bytearray) -> None:
    """A length or a count of another size."""
    place = _used(rng, raw)
    size = rng.choice((1, 4, 8))
    value = rng.choice((0, 1, 0x7F, 0xFF, 1 << 31, (1 << 63) + 5)) % (1 << (8 * size))
    raw[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))


def cut(rng: random.Random, raw: bytearray) -> None:
    del raw[rng.randrange(len(raw)) :]


def header_text(rng: random.Random, raw: bytearray) -> None:
    text = bytearray(_header(raw))
    for _ in range(rng.randrange(1, 4)):
        text[rng.randrange(len(text))] = rng.choice(b'0123456789"[]{},:-eabx\xff')
    _replace_header(raw, bytes(text))


def header_value(rng: random.Random, raw: bytearray) -> None:
    """Another value, or none, at any key of the header."""
    content = json.loads(_header(raw))
    places = list(_places(content))
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(NUMBERS)
    _replace_header(raw, json.dumps(content).encode())


def _places(value: object) -> list[tuple[dict | list, str | int]]:  # type: ignore[type-arg]
    found: list[tuple[dict | list, str | int]] = []  # type: ignore[type-arg]
    items = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
    for key, child in items:
        found.append((value, key))  # type: ignore[arg-type]
        if isinstance(child, dict | list):
            found += _places(child)
    return found


def _used(rng: random.Random, raw: bytearray) -> int:
    """A place of the header text or of a page, not of the filler."""
    if rng.random() < 0.3:
        return rng.randrange(8 + len(_header(raw)))
    place = HEADER_SIZE + rng.randrange(max(len(raw) - HEADER_SIZE, 1))
    return min(place - place % 4096 + rng.randrange(600), len(raw) - 1)


MUTATIONS: tuple[Mutation, ...] = (flip, number, cut, header_text, header_value)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("originals")
    tokens = {"input_ids": ("int32", [-1]), "labels": ("int32", [-1])}
    made = []
    for version in ("2.0", "3.0"):
        made += write_mindrecord(folder / f"a{version}.mindrecord", EVERY_TYPE,
                                 rows_of(EVERY_TYPE, 40), version=version)  # fmt: skip
        rows = [{"input_ids": np.arange(row, row + 9), "labels": np.arange(row, row + 9)}
                for row in range(50)]  # fmt: skip
        made += write_mindrecord(folder / f"b{version}.mindrecord", tokens, rows, version=version)
    return made


def check(path: Path, folder: Path) -> None:
    """Everything that reads a file: the check of a configuration, its rows, a data set of it."""
    section = DataLoaderSection(type="MindDataset", dataset_dir=str(path))
    assert all(problem.rule for _, problem in problems(section, DatasetSection(), 64))
    for read in (_records, _data_set):
        found = None
        try:
            read(path, section, folder)
        except UserError as error:
            found = error
        assert found is None or all(problem.rule for problem in found.problems)
        assert read is _data_set or found is None or str(path) in str(found)


def _records(path: Path, section: DataLoaderSection, folder: Path) -> None:
    reader = read_rows(path)
    for index in range(min(len(reader), 100)):
        reader.record(index)


def _data_set(path: Path, section: DataLoaderSection, folder: Path) -> None:
    dataset = build_dataset(
        DatasetSection(data_loader=section), tokenizer=None, seq_length=16, cache_dir=folder,
        once=lambda prepare: prepare(), log=lambda line: None,
    )  # fmt: skip
    rows = [dataset.row(index) for index in range(min(len(dataset), 100))]
    assert all(row.input_ids.shape == (16,) for row in rows)


def run(seed: int, cases: int, originals: list[Path], folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = random.Random(seed)
    for case in range(cases):
        raw = bytearray(rng.choice(originals).read_bytes())
        for _ in range(rng.choice((1, 1, 2))):
            if len(raw) > 8 and len(_header(raw)) > 2:
                try:
                    rng.choice(MUTATIONS)(rng, raw)
                except ValueError:
                    continue  # the header is no JSON any more
        path = folder / f"{case}.mindrecord"
        path.write_bytes(raw)
        check(path, folder / "cache")
        path.unlink()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MEMORY_KILOBYTES


@pytest.mark.parametrize("seed", range(2))
def test_mutated_files(seed: int, originals: list[Path], tmp_path: Path) -> None:
    run(seed, 60, originals, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_mutated_files(seed: int, originals: list[Path], tmp_path: Path) -> None:
    run(seed, 500, originals, tmp_path)


def test_random_bytes_are_no_integers_and_no_values() -> None:
    rng = random.Random(1)
    for case in range(3000):
        values = [rng.randrange(-(1 << rng.randrange(1, 63)), 1 << 40)
                  for _ in range(rng.randrange(9))]  # fmt: skip
        block = bytearray(narrow(np.array(values, dtype=np.int64)))
        block[rng.randrange(len(block))] = rng.randrange(256)
        fields = bytearray(b"\x82" + pack("a") + pack(case) + pack("b") + pack(case / 7))
        fields[rng.randrange(len(fields))] = rng.randrange(256)
        with contextlib.suppress(NotNarrowed):
            assert len(narrowed(np.frombuffer(bytes(block), dtype=np.uint8))) < 50
        with contextlib.suppress(NotMsgpack):
            unpack_map(bytes(fields))
