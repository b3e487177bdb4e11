"""In use: a lock, so that only one run at a time writes to a folder.

A second run in the folder of a running one would use the same names for its saves, and remove a
save that is being written. The lock is an `flock` on the folder itself: nothing is written, and it
ends with the process that holds it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import UserError
from launcher.parallel.filesystems import find_filesystem_groups
from launcher.parallel.world import World

WAIT_SECONDS = 5.0
"""How long a run waits for another to end, as before a restart."""
_POLL_SECONDS = 0.2


@contextmanager
def in_use(folders: Sequence[Path], world: World) -> Iterator[None]:
    """Lock `folders`, which are created if missing, against other runs.

    Called by all ranks together: one rank of each file system holds the lock. Raises `UserError` on
    all ranks while another run holds one of them. File systems without locks are not locked.
    """
    held: list[int] = []
    try:
        for folder in folders:
            find_filesystem_groups(folder, world).on_each(world, "", _lock, folder, held)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(folder: Path, held: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    held.append(descriptor)
    deadline = time.monotonic() + WAIT_SECONDS
    while not _is_locked(descriptor):
        if time.monotonic() > deadline:
            raise UserError(
                f"another run is using {folder}",
                rule="only one run at a time may write to a folder",
                advice="Wait for it, stop it, or give another output_dir",
            )
        time.sleep(_POLL_SECONDS)


def _is_locked(descriptor: int) -> bool:
    """Whether the lock is held now, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
