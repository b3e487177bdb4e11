"""Space: is there room for one before its first byte is written?

Owns the question to the file system. A disk that fills up in the middle of a save has cost minutes
of writing, and leaves no room for the logs that would tell. What this does not see: quotas, and
what other programs or other machines write meanwhile; then the save fails as it writes, and the
checkpoints there are stay whole all the same.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from launcher.parallel.world import World

SMALL_FILES_BYTES = 1 << 20
"""Left for the state, the manifest and the records of the ranks."""


def bytes_on_host(world: World, nbytes: int) -> int:
    """The sum of `nbytes` over the ranks of this machine. Called by all ranks together."""
    here = socket.gethostname()
    return sum(part for host, part in world.gather((here, nbytes)) if host == here)


def size_text(nbytes: float) -> str:
    """`12.3 MB` or `45.6 GB`."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def free_bytes(root: Path) -> int | None:
    """Free bytes where `root` lies; None where the file system does not say how large it is, as
    some over a network. Raises `OSError`."""
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def room_for(root: Path, nbytes: int) -> None:
    """Check that `nbytes` of rank files, and the small files of a save, fit where `root` lies.

    Raises `OSError` (ENOSPC) that gives both sizes, and that of the system when `root` cannot be
    asked about. A file system that does not say how large it is, as some over a network, has room.
    """
    free = free_bytes(root)
    if free is not None and free < nbytes + SMALL_FILES_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"no room: {nbytes / 1e6:,.1f} MB are to be written, {free / 1e6:,.1f} MB are free",
            str(root),
        )
