"""Pages: large ones under memory that is still to be written, whose first touch is then fast.

Owns what the system is asked for memory (Linux; elsewhere nothing is asked). A large page lies
under 2 MiB that all may have large ones. The allocator writes a few bytes of its own before each
tensor, and so touches a small page of a block that the tensor and its neighbour share:

    memory   |h tensor one      |h tensor two      |h three  |        h: of the allocator
    blocks   |. . . . |. . . . |. . . . |. . . . |. . . . |

Blocks without such a page get a large one when they are touched. The others have to be asked for by
address, once all around them may have large ones.
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
"""What an administrator allows: https://docs.kernel.org/admin-guide/mm/transhuge.html"""

_LIBC = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def are_allowed() -> bool:
    """Whether there are large pages, and an administrator lets processes ask for them (not all that
    asks is told no: MADV_COLLAPSE does as it is told)."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in ENABLED.read_text()
    except OSError:
        return False


def use_huge_pages(memory: Iterable[tuple[int, int]]) -> set[int]:
    """Allow large pages under `memory`: (address, bytes) of what is going to be written.

    Returns the blocks to be asked for (`make_huge`) before anything is written to them.
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
    """Put large pages, with what is in them now, under those `wanted` blocks that `nbytes` at
    `address` begin or end in; they are wanted no longer."""
    last = address + max(nbytes, 1) - 1
    for block in {address - address % HUGE_PAGE, last - last % HUGE_PAGE} & wanted:
        wanted.discard(block)
        _advise(block, HUGE_PAGE, MADV_COLLAPSE)


def _end_to_end(memory: Iterable[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    """(first byte, byte after the last, addresses in it) of what shares pages or touches."""
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
    """What the system does not know, or has no room for, it does not do."""
    if _LIBC is not None:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice)
