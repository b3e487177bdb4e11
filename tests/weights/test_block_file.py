"""Files written in blocks: the right bytes on every way to the disk; errors name the file."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from launcher.weights.streaming import block_file
from launcher.weights.streaming.block_file import ALIGNMENT, BlockFile
from launcher.weights.threads import in_parallel

BLOCK = 4 * ALIGNMENT


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Path:
    """Where a file is taken to lie on a disk, and where it is not."""
    monkeypatch.setattr(block_file, "_is_on_disk", lambda descriptor: request.param == "disk")
    return tmp_path


def aligned(content: bytes) -> memoryview:
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memoryview(memory)


def write(path: Path, content: bytes, pieces_of) -> None:
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    with BlockFile(path, BLOCK, 2) as file:
        in_parallel(lambda n: file.write(pieces_of(blocks[n]), n * BLOCK), range(len(blocks)), 2)
        file.finish(len(content))


PIECES = {
    "one": lambda block: [memoryview(block)],
    "many": lambda block: [memoryview(block)[at : at + 777] for at in range(0, len(block), 777)],
    "aligned": lambda block: [aligned(block)],
    "neighbours": lambda block: [aligned(block)[:5], aligned(block)[5:]],
}


@pytest.mark.parametrize("nbytes", [1, ALIGNMENT, 5 * BLOCK, 5 * BLOCK + 4321])
@pytest.mark.parametrize("pieces", PIECES)
def test_a_file_has_the_bytes_it_was_given(folder: Path, pieces: str, nbytes: int) -> None:
    content = np.random.default_rng(nbytes).bytes(nbytes)
    path = folder / "file"
    path.write_bytes(bytes(nbytes + 3 * BLOCK))  # an older one, and longer
    write(path, content, PIECES[pieces])
    assert path.read_bytes() == content


def test_pieces_that_lie_behind_each_other_are_one(monkeypatch) -> None:
    memory = aligned(bytes(range(256)) * (BLOCK // 256))
    found = block_file._one_aligned([memory[:5], memory[5:4000], memory[4000:]])
    assert found == memory
    assert block_file._one_aligned([memory[:5], memory[6:]]) is None
    assert block_file._one_aligned([memory[:5000]]) is None
    assert block_file._one_aligned([memory[1:]]) is None


def test_a_disk_that_refuses_such_writes_gets_others(tmp_path: Path, monkeypatch) -> None:
    content = np.random.default_rng(1).bytes(3 * BLOCK)
    plain, refused = os.pwrite, set[int]()

    def pwrite(descriptor: int, view: memoryview, position: int) -> int:
        if position % BLOCK == 0 and position not in refused:  # of each thread the first
            refused.add(position)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, view[:1000], position)

    monkeypatch.setattr(block_file, "_is_on_disk", lambda descriptor: True)
    monkeypatch.setattr(os, "pwrite", pwrite)
    write(tmp_path / "file", content, PIECES["one"])
    assert len(refused) == 3
    assert (tmp_path / "file").read_bytes() == content


def test_what_cannot_be_written_is_named(folder: Path, monkeypatch) -> None:
    def full(descriptor: int, view: memoryview, position: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(folder / "file", bytes(BLOCK), PIECES["one"])
    assert caught.value.filename == str(folder / "file")
