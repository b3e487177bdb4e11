"""Transfers of many small tensors: few system calls, the right bytes, whatever the system gives."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from launcher.errors import UserError
from launcher.weights.reading.strided_copy import StridedCopy
from launcher.weights.reading.transfer import VIEWS, Files, Transfer, read_all, read_exactly

TENSORS = 2 * VIEWS + 10
TENSOR_BYTES = 48


@pytest.fixture
def content() -> bytes:
    return random.Random(5).randbytes(40_000)


def row(path: Path, memory: np.ndarray, start: int = 100) -> list[Transfer]:
    """Tensors end to end in a file from `start` on, to places in memory in the opposite order."""
    return [
        Transfer(path, StridedCopy(start + i * TENSOR_BYTES, (TENSORS - 1 - i) * TENSOR_BYTES,
                            TENSOR_BYTES, ()), memory)
        for i in range(TENSORS)
    ]  # fmt: skip


def expected(content: bytes, start: int = 100) -> bytes:
    parts = [content[start + i * TENSOR_BYTES :][:TENSOR_BYTES] for i in range(TENSORS)]
    return b"".join(reversed(parts))


def test_neighbours_come_in_few_calls(tmp_path, monkeypatch, content: bytes) -> None:
    path, calls, real = tmp_path / "w.bin", [], os.preadv
    path.write_bytes(content)
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(len(a[1])) or real(*a))
    memory = np.zeros(TENSORS * TENSOR_BYTES, np.uint8)
    with Files() as files:
        assert read_all(files, row(path, memory)) == memory.nbytes
    assert memory.tobytes() == expected(content)
    assert calls == [VIEWS, VIEWS, 10]


def test_a_system_that_gives_less_than_it_is_asked_for(tmp_path, monkeypatch, content) -> None:
    path, real, chance = tmp_path / "w.bin", os.preadv, random.Random(7)
    path.write_bytes(content)

    def less(descriptor: int, views, position: int) -> int:
        return real(descriptor, [views[0][: chance.randint(1, len(views[0]))]], position)

    memory = np.zeros(TENSORS * TENSOR_BYTES, np.uint8)
    with Files() as files:
        read_all(files, row(path, memory))
        monkeypatch.setattr(os, "preadv", less)
        again = np.zeros_like(memory)
        read_all(files, row(path, again))
    assert again.tobytes() == memory.tobytes() == expected(content)


@pytest.mark.parametrize("seed", range(20))
def test_any_transfers_put_every_byte_in_its_place(tmp_path, seed: int) -> None:
    chance = random.Random(seed)
    files_content = {tmp_path / f"{n}.bin": chance.randbytes(5_000) for n in range(2)}
    for path, data in files_content.items():
        path.write_bytes(data)
    memory, wanted = np.zeros(60_000, np.uint8), bytearray(60_000)
    transfers, place, position = [], 0, 0
    for _ in range(60):
        path = chance.choice(list(files_content))
        length = chance.choice((0, 8, 24))
        loops = () if chance.random() < 0.7 else ((3, chance.choice((length, 40)), 32),)
        if chance.random() < 0.3:
            position = chance.randrange(4_000)
        strided_copy = StridedCopy(position, place, length, loops)
        for start, goal, count in strided_copy:
            wanted[goal : goal + count] = files_content[path][start : start + count]
        transfers.append(Transfer(path, strided_copy, memory))
        place, position = place + 128, (position + strided_copy.file_span) % 4_000
    with Files() as files:
        read = read_all(files, transfers)
    assert memory.tobytes() == bytes(wanted)
    assert read == sum(transfer.strided_copy.nbytes for transfer in transfers)


def test_a_file_that_ends_within_a_row(tmp_path, content: bytes) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(content[:1_000])
    with Files() as files, pytest.raises(UserError, match="ended early"):
        read_all(files, row(path, np.zeros(TENSORS * TENSOR_BYTES, np.uint8)))


def test_nothing_is_read_into_no_memory(tmp_path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"")
    with Files() as files:
        read_exactly(files.descriptor(path), path, memoryview(bytearray()), 0)
