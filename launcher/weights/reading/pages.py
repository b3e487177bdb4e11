"""Huge pages for memory that is about to be written, which makes its first touch fast.

Owns the calls of madvise for memory (Linux; a no-op elsewhere). A block of 2 MiB gets a huge page
at its first touch if all of it is advised. The allocator writes a few bytes before each tensor, and
so touches a small page in a block that the tensor shares with its neighbour:

    memory   |h tensor one      |h tensor two      |h three  |        h: bytes of the allocator
    blocks   |. . . . |. . . . |. . . . |. . . . |. . . . |

Blocks without such a page get a huge page at their first touch. The others are collapsed
explicitly, by address.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

HUGE_PAGE = 2 << 20
MADV_COLLAPSE = 25
"""Of Linux 6.1 and later: https://man7.org/linux/man-pages/man2/madvise.2.html"""

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""The setting of the administrator: https://docs.kernel.org/admin-guide/mm/transhuge.html"""

_LIBC = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def are_allowed() -> bool:
    """Whether the system has huge pages and lets processes advise them (MADV_COLLAPSE ignores the
    setting of the administrator)."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in ENABLED.read_text()
    except OSError:
        return False


def use_huge_pages(memory: Iterable[tuple[int, int]]) -> set[int]:
    """Advise huge pages for `memory`: (address, bytes) of what is going to be written.

    Returns the blocks that `make_huge` must collapse before anything is written to them.
    """
    wanted = set[int]()
    if not are_allowed():
        return wanted
    for start, stop, addresses in _end_to_end(memory):
        if stop - start < 2 * HUGE_PAGE:
            continue
        _advise(start, stop - start, mmap.MADV_HUGEPAGE)
        begun = {address - address % HUGE_PAGE for address in addresses}
        wanted |= {b for b in begun if start <= b and b + HUGE_PAGE <= stop}
    return wanted


def make_huge(wanted: set[int], address: int, nbytes: int) -> None:
    """Collapse those `wanted` blocks in which `nbytes` at `address` begin or end into huge pages,
    and remove them from `wanted`."""
    last = address + max(nbytes, 1) - 1
    for block in {address - address % HUGE_PAGE, last - last % HUGE_PAGE} & wanted:
        wanted.discard(block)
        _advise(block, HUGE_PAGE, MADV_COLLAPSE)


def _end_to_end(memory: Iterable[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    """(first byte, byte after the last, addresses in it) of regions that share pages or touch."""
    found = list[tuple[int, int, list[int]]]()
    for address, nbytes in sorted(memory):
        start = address - address % mmap.PAGESIZE
        stop = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if found and start <= found[-1][1]:
            first, last, addresses = found.pop()
            found.append((first, max(last, stop), [*addresses, address]))
        else:
            found.append((start, stop, [address]))
    return found


def _advise(start: int, nbytes: int, advice: int) -> None:
    """Call madvise; errors are ignored, as it is advice."""
    if _LIBC is not None:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice)
