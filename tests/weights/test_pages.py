"""Large pages: where they are asked for, and that what lies in memory stays as it is."""

import ctypes
import mmap
import random

import numpy as np
import pytest
import torch

from launcher.weights.reading import pages
from launcher.weights.reading.pages import HUGE_PAGE, make_huge, use_huge_pages
from launcher.weights.reading.tensor_bytes import Storages

pytestmark = [
    pytest.mark.usefixtures("allowed"),
    pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"),
                       reason="a system without large pages (not Linux) has none to ask for"),
]  # fmt: skip

BLOCKS = 12


@pytest.fixture
def memory():
    """(bytes, address of their first whole block) of fresh memory."""
    mapped = mmap.mmap(-1, (BLOCKS + 1) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
    address = ctypes.addressof(view)
    yield np.frombuffer(view, np.uint8), address + -address % HUGE_PAGE
    del view


def test_blocks_in_which_a_tensor_begins_are_asked_for(memory) -> None:
    _, block = memory
    one = (block + 64, 3 * HUGE_PAGE)  # begins behind the first bytes of block 0
    two = (block + 3 * HUGE_PAGE + 4096 + 64, 2 * HUGE_PAGE)  # in block 3, whose page 0 is one's
    apart = (block + 8 * HUGE_PAGE + 4096, 2 * HUGE_PAGE)
    assert use_huge_pages([two, apart, one]) == {block, block + 3 * HUGE_PAGE}


def test_what_the_system_is_told(memory, monkeypatch) -> None:
    _, block = memory
    reported: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda *given: reported.append(given))
    one, two = (block + 64, 3 * HUGE_PAGE), (block + 3 * HUGE_PAGE + 4096 + 64, 2 * HUGE_PAGE)
    wanted = use_huge_pages([one, two])
    assert reported == [(block, 5 * HUGE_PAGE + 8192, mmap.MADV_HUGEPAGE)]
    make_huge(wanted, *one)
    assert sorted(reported[1:]) == [
        (block, HUGE_PAGE, pages.MADV_COLLAPSE),
        (block + 3 * HUGE_PAGE, HUGE_PAGE, pages.MADV_COLLAPSE),
    ]
    make_huge(wanted, *two)
    assert len(reported) == 3


def test_what_an_administrator_forbids_is_not_asked_for(memory, monkeypatch, allowed) -> None:
    reported: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda *given: reported.append(given))
    for text in ("always madvise [never]", None):
        allowed.write_text(text) if text else allowed.unlink()
        assert use_huge_pages([(memory[1] + 64, 4 * HUGE_PAGE)]) == set()
    assert reported == []


def test_what_is_around_small_memory_is_not_touched(memory) -> None:
    _, block = memory
    assert use_huge_pages([(block + 64, HUGE_PAGE)]) == set()
    assert use_huge_pages([(block + HUGE_PAGE // 2, 3 * HUGE_PAGE)]) == set()


def test_a_block_is_asked_for_once_by_whoever_begins_or_ends_in_it(memory) -> None:
    _, block = memory
    wanted = {block, block + HUGE_PAGE, block + 5 * HUGE_PAGE}
    make_huge(wanted, block + 100, HUGE_PAGE)
    assert wanted == {block + 5 * HUGE_PAGE}
    make_huge(wanted, block + 100, HUGE_PAGE)
    make_huge(wanted, block + 5 * HUGE_PAGE, 0)
    assert wanted == set()


def test_what_was_written_stays(memory) -> None:
    content, block = memory
    for place in random.Random(3).choices(range(len(content)), k=500):
        content[place] = place % 251
    before = content.copy()
    wanted = {block + n * HUGE_PAGE for n in range(BLOCKS)}
    make_huge(wanted, block, HUGE_PAGE)
    for n in range(1, BLOCKS):
        make_huge(wanted, block + n * HUGE_PAGE, HUGE_PAGE)
    assert not wanted
    assert np.array_equal(content, before)


def test_storages_keep_what_tensors_hold() -> None:
    stack = torch.arange(3 << 20, dtype=torch.int32).reshape(3, -1)
    others = [torch.full((size,), size, dtype=torch.int32) for size in (7, 1 << 20, 5 << 19)]
    before = [tensor.clone() for tensor in (*stack, *others)]
    storages = Storages([*stack, *others])
    found = [storages.under(tensor) for tensor in (*stack, *others)]
    assert found[0] is found[1] is found[2]
    assert [memory.nbytes for memory in found[2:]] == [12 << 20, 28, 4 << 20, 10 << 20]
    assert all(torch.equal(a, b) for a, b in zip(before, (*stack, *others), strict=True))


def test_storages_that_begin_at_one_address_are_several() -> None:
    buffer = np.arange(16, dtype=np.float32)
    half, whole = torch.from_numpy(buffer[:8]), torch.from_numpy(buffer)
    assert half.data_ptr() == whole.data_ptr()
    storages = Storages([half, whole])
    assert [storages.under(tensor).nbytes for tensor in (half, whole)] == [32, 64]
