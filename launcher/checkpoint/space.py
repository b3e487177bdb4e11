"""Disk space: checked before the first byte of a save is written.

A disk that fills up during a save costs minutes of writing, and leaves no space for logs. This
check does not see quotas, or what other programs and machines write meanwhile. Then the save fails
during writing, and earlier checkpoints stay valid all the same.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from launcher.parallel.world import World

SMALL_FILES_BYTES = 1 << 20
"""Reserved for the state, the manifest and the records of the ranks."""


def bytes_on_host(world: World, nbytes: int) -> int:
    """The sum of `nbytes` over the ranks of this machine. Called by all ranks together."""
    here = socket.gethostname()
    return sum(part for host, part in world.gather((here, nbytes)) if host == here)


def size_text(nbytes: float) -> str:
    """`12.3 MB` or `45.6 GB`."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def free_bytes(root: Path) -> int | None:
    """Free bytes at `root`; None where the file system has no size, as some network file systems.
    Raises `OSError`."""
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def room_for(root: Path, nbytes: int) -> None:
    """Check that `nbytes` of rank files, and the small files of a save, fit at `root`.

    Raises `OSError` (ENOSPC) with both sizes, or that of `statvfs`. A file system without a size is
    assumed to have room.
    """
    free = free_bytes(root)
    if free is not None and free < nbytes + SMALL_FILES_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"no room: the save takes {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free",
            str(root),
        )
