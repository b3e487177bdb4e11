"""The ring: blocks that are ready, on disk, between one producer and the ranks of its machine.

Owns a folder of one job on one machine:

    owner.lock              has the name of the machine, locked by the leading rank while the job
                            runs
    reader_<n>              two numbers of rank n of the machine: the first block that it still
                            needs, and the last one that it waits for
    000000000017/           the rows of a block, complete (renamed when they are)
    error.json              why the producer ended

Invariants: a block is deleted only when every reader needs later ones; files are written under
another name and renamed, so that none is read half-written; two jobs never share a ring.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from launcher.errors import Problem, UserError

PREFIX = "ring-"
ABANDONED_SECONDS = 7 * 86400.0
_LOCK = "owner.lock"
_ERROR = "error.json"


class Ring:
    """The folder of one job on one machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def block(self, number: int) -> Path:
        """The folder of a block."""
        return self.folder / f"{number:012d}"

    def publish_reader(self, reader: int, low: int, wanted: int) -> None:
        """Reader `reader` needs the blocks from `low` on, and waits for those up to `wanted`."""
        with suppress(FileNotFoundError):  # the job has ended
            _replace(self.folder / f"reader_{reader}", f"{low} {wanted}")

    def readers(self, count: int) -> list[tuple[int, int]]:
        """What the readers published, those that have."""
        found = []
        for reader in range(count):
            with suppress(FileNotFoundError):
                low, wanted = (self.folder / f"reader_{reader}").read_text().split()
                found.append((int(low), int(wanted)))
        return found

    def fail(self, problems: Iterable[Problem], *, is_user_error: bool) -> None:
        """Report to the readers why no more blocks come."""
        content = {"user": is_user_error, "problems": [asdict(problem) for problem in problems]}
        with suppress(FileNotFoundError):  # the job has ended
            _replace(self.folder / _ERROR, json.dumps(content))

    def error(self) -> Exception | None:
        """Why no more blocks come; None: they do."""
        try:
            content = json.loads((self.folder / _ERROR).read_text())
        except FileNotFoundError:
            return None
        problems = [Problem(**problem) for problem in content["problems"]]
        if content["user"]:
            return UserError(problems)
        return RuntimeError("\n".join(map(str, problems)))


class OwnedRing(Ring):
    """A new ring in `parent`, which this process owns until `close`."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent.parent)
        name = uuid4().hex
        scratch = parent / f".{name}.tmp"
        scratch.mkdir()
        self._lock: IO[Any] = (scratch / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._lock.write(socket.gethostname())
        self._lock.flush()
        super().__init__(parent / f"{PREFIX}{name}")
        scratch.rename(self.folder)

    def close(self) -> None:
        """Delete the ring."""
        _remove(self.folder)
        self._lock.close()


def _remove_abandoned(cache_dir: Path) -> None:
    """Delete the rings of jobs that were killed, of all streams: their lock is free.

    Not every shared file system knows the locks of other machines: a ring of another one is
    deleted only when it has not changed for ABANDONED_SECONDS.
    """
    for folder in cache_dir.glob(f"stream-*/{PREFIX}*"):
        with suppress(OSError), (folder / _LOCK).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.seek(0)
            is_own = lock.read() == socket.gethostname()
            if is_own or time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                _remove(folder)
    for scratch in cache_dir.glob("stream-*/.*.tmp"):  # a job was killed while it made a ring
        with suppress(OSError):
            if time.time() - scratch.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Delete a ring. It is renamed first, so that no rank adds a file meanwhile."""
    gone = folder.with_name(f".{folder.name}.tmp")
    with suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    scratch.write_text(text)
    os.replace(scratch, path)
