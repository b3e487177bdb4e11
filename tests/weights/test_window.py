"""Windows: what the system is asked to have in memory before a read, and what it must not break."""

from __future__ import annotations

import ctypes
import mmap
import os
import random

import numpy as np
import pytest

from launcher.errors import UserError
from launcher.weights.reading import pages, window
from launcher.weights.reading.pages import HUGE_PAGE
from launcher.weights.reading.strided_copy import StridedCopy
from launcher.weights.reading.transfer import SHORT_RUN, Files, read_strided
from launcher.weights.reading.window import MADV_POPULATE_READ, PULLED_BYTES, WINDOW_BYTES, Window

pytestmark = [
    pytest.mark.usefixtures("allowed"),
    pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"),
                       reason="a system without large pages (not Linux) has none to ask for"),
]  # fmt: skip

BLOCKS = WINDOW_BYTES // HUGE_PAGE + 4


@pytest.fixture
def file(tmp_path):
    """Random bytes, a little more than a window has room for."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(BLOCKS * HUGE_PAGE + 5))
    return path


@pytest.fixture
def pulled(monkeypatch):
    """Blocks of the file that were asked for, in order, as if none were in memory; the real system
    is asked too."""
    blocks: list[int] = []
    monkeypatch.setattr(window, "_is_in_memory", lambda descriptor, position: False)

    class Told(mmap.mmap):
        def __new__(cls, descriptor, length, access, offset):
            made = super().__new__(cls, descriptor, length, access=access, offset=offset)
            made.offset = offset
            return made

        def madvise(self, advice, start=0, length=0):
            if advice == MADV_POPULATE_READ:
                assert length == mmap.PAGESIZE
                blocks.append((self.offset + start) / HUGE_PAGE)
                return super().madvise(advice, start, length)
            return super().madvise(advice)

    monkeypatch.setattr(window.mmap, "mmap", Told)
    return blocks


def test_blocks_of_a_long_read_are_asked_for(file, pulled) -> None:
    position, nbytes = HUGE_PAGE + 7, 2 * HUGE_PAGE
    memory = bytearray(nbytes)
    with Files() as files:
        assert files.read(file, [memoryview(memory)], position) == nbytes
    assert pulled == [1, 2, 3]
    assert memory == file.read_bytes()[position : position + nbytes]


def test_a_read_longer_than_a_window_moves_it(file, pulled) -> None:
    memory = bytearray(file.stat().st_size)
    with Files() as files:
        files.read(file, [memoryview(memory)], 0)
    assert pulled == list(range(BLOCKS + 1))
    assert memory == file.read_bytes()


def test_short_reads_are_left_to_the_system(file, pulled) -> None:
    memory = memoryview(bytearray(PULLED_BYTES - 1))
    with Files() as files:
        files.read(file, [memory], HUGE_PAGE)
    assert pulled == []
    assert memory == file.read_bytes()[HUGE_PAGE:][: len(memory)]


def test_nothing_is_asked_for_that_is_not_allowed(file, pulled, allowed) -> None:
    allowed.write_text("always madvise [never]")
    with Files() as files:
        files.read(file, [memoryview(bytearray(HUGE_PAGE))], 0)
    assert pulled == []


def test_nothing_is_asked_for_that_is_in_memory(file, pulled, monkeypatch) -> None:
    in_memory = {HUGE_PAGE + 7: True, 2 * HUGE_PAGE: False, 3 * HUGE_PAGE: True}
    monkeypatch.setattr(window, "_is_in_memory", lambda descriptor, at: in_memory[at])
    with Files() as files:
        files.read(file, [memoryview(bytearray(2 * HUGE_PAGE))], HUGE_PAGE + 7)
    assert pulled == [2]


def test_the_system_tells_what_is_in_memory(file) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.pread(descriptor, 1, 0)
    if window._is_in_memory(descriptor, 0):  # else this system does not tell
        assert residence(descriptor, 0, mmap.PAGESIZE) == {1}
        last = HUGE_PAGE * (BLOCKS - 1)
        reported = {int(window._is_in_memory(descriptor, last))}
        assert reported == residence(descriptor, last, mmap.PAGESIZE)
    assert not window._is_in_memory(descriptor, file.stat().st_size + HUGE_PAGE)
    assert not window._is_in_memory(-1, 0)
    os.close(descriptor)


def test_what_is_pulled_is_in_memory(file) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    one = Window()
    one.pull(descriptor, file, 2 * HUGE_PAGE, 4 * HUGE_PAGE)
    one.close()
    assert residence(descriptor, 2 * HUGE_PAGE, 2 * HUGE_PAGE) == {1}
    os.close(descriptor)


def residence(descriptor: int, start: int, nbytes: int) -> set[int]:
    """What mincore says about the pages of a file: 1 is in memory."""
    mapped = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE, offset=start)
    answer = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
    first = ctypes.c_char.from_buffer(mapped)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(ctypes.addressof(first))
    assert libc.mincore(address, ctypes.c_size_t(nbytes), answer) == 0
    del first
    mapped.close()
    return {page & 1 for page in answer}


def test_a_file_that_has_become_shorter_is_an_error_and_no_signal(file) -> None:
    memory = memoryview(bytearray(4 * HUGE_PAGE))
    with Files() as files:
        files.read(file, [memory], 0)
        os.truncate(file, HUGE_PAGE + 100)
        with pytest.raises(UserError, match="ended early"):
            files.read(file, [memory], 0)
        with pytest.raises(UserError, match="ended early"):
            files.window().over(files.descriptor(file), file, 0, 2 * HUGE_PAGE)
        os.truncate(file, 0)
        with pytest.raises(UserError, match="ended early"):
            files.read(file, [memory], 0)


def test_a_block_that_cannot_be_had_leaves_the_word_to_the_read(file, monkeypatch) -> None:
    def denied(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(window.mmap, "mmap", denied)
    memory = bytearray(HUGE_PAGE)
    with Files() as files:
        files.read(file, [memoryview(memory)], 0)
    assert memory == file.read_bytes()[:HUGE_PAGE]


def test_a_system_is_asked_once_what_it_may_do(file, monkeypatch) -> None:
    """Small runs are many: what an administrator says is not read again before each of them."""
    asked: list[None] = []
    monkeypatch.setattr(pages, "are_allowed", lambda: asked.append(None) or True)
    memory = np.zeros(64 * SHORT_RUN, np.uint8)
    with Files() as files:
        for _ in range(3):
            read_strided(
                files, file, StridedCopy(0, 0, SHORT_RUN, ((64, 2 * SHORT_RUN, SHORT_RUN),)), memory
            )
            read_strided(files, file, StridedCopy(0, 0, 8, ((64, 64, 8),)), memory)
            files.read(file, [memory.data], 5)
    assert len(asked) == 1
    assert bytes(memory) == file.read_bytes()[5:][: len(memory)]


@pytest.mark.parametrize("refused", [getattr(mmap, "MADV_HUGEPAGE", 14), MADV_POPULATE_READ])
def test_advice_that_is_refused_is_given_once(file, monkeypatch, refused) -> None:
    given: list[int] = []

    class Strict(mmap.mmap):
        def madvise(self, advice, *place):
            given.append(advice)
            if advice == refused:
                raise OSError(22, "Invalid argument")
            return super().madvise(advice, *place)

    monkeypatch.setattr(window.mmap, "mmap", Strict)
    monkeypatch.setattr(window, "_is_in_memory", lambda descriptor, position: False)
    memory, content = bytearray(4 * HUGE_PAGE), file.read_bytes()
    with Files() as files:
        for position in (0, HUGE_PAGE):
            files.read(file, [memoryview(memory)], position)
            assert memory == content[position:][: len(memory)]
        found = files.window().over(files.descriptor(file), file, 5, HUGE_PAGE)
        assert bytes(found) == content[5:HUGE_PAGE]
        del found
    assert given.count(refused) == 1
