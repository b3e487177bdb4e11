"""In use: one run at a time trains into a folder.

Owns the lock. A second run in the folder of one that is still at work would take the same names for
its saves, and clear away a save that is being written. The lock is one of the system (`flock`) on
the folder itself: nothing is written, and it ends with the process that holds it.
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

PATIENCE_SECONDS = 5.0
"""How long a run waits for one that is about to end, as before a restart."""
_POLL_SECONDS = 0.2


@contextmanager
def in_use(folders: Sequence[Path], world: World) -> Iterator[None]:
    """Hold `folders`, which are made where they are missing, against other runs.

    Called by all ranks together: one rank of each disk holds the lock. Raises `UserError` on all
    ranks while another run holds one of them. A file system without locks is not held.
    """
    held: list[int] = []
    try:
        for folder in folders:
            find_filesystem_groups(folder, world).on_each(world, "", _hold, folder, held)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _hold(folder: Path, held: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    held.append(descriptor)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _is_locked(descriptor):
        if time.monotonic() > deadline:
            raise UserError(
                f"another run is training into {folder}",
                rule="one run at a time writes to a folder",
                advice="Wait for it, end it, or give another output_dir",
            )
        time.sleep(_POLL_SECONDS)


def _is_locked(descriptor: int) -> bool:
    """Whether the lock is held now, or cannot be had on this file system."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
