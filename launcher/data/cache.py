"""The folders of the data cache: who makes one, who uses one, and which are deleted.

    KEY/             one dataset, complete: renamed from its temporary name
    KEY/in_use       locked (shared) by every process that reads it; its time: the last use
    .KEY.lock        locked (exclusive) by the job that makes KEY; the others wait
    .KEY.*.tmp       what that job has written so far

Invariants: a folder appears under its name complete or not at all; only folders of this form are
deleted, and never one that a live process has locked. Locks end with their process. On file systems
without locks two jobs may make the same folder (the first rename counts), and a folder is deleted
only when it was not opened for `UNLOCKED_SECONDS`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from launcher.data.progress import OnProgress, Progress

LEASE = "in_use"
FACTS = "facts.json"
UNLOCKED_SECONDS = 7 * 86400.0
LEFTOVER_SECONDS = 86400.0
POLL_SECONDS = 0.2
_KEY = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Lease:
    """The use of one folder by this process, until `close`."""

    descriptor: int

    def close(self) -> None:
        """End the use."""
        with suppress(OSError):
            os.close(self.descriptor)


def take_lease(folder: Path) -> Lease | None:
    """Use a folder, so that no job deletes it; None where it does not exist (any more)."""
    path = folder / LEASE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not _is_at(path, descriptor):  # deleted before it was locked
        os.close(descriptor)
        return None
    with suppress(OSError):  # a cache of another user
        os.utime(path)
    return Lease(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the file that was opened."""
    try:
        there, opened = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)


@contextmanager
def only_maker(
    cache_dir: Path, key: str, is_made: Callable[[], bool], waits: Callable[[str], None]
) -> Iterator[None]:
    """Make the folder `key` alone: other jobs that would make it wait until this one is done.

    Returns early when another job has made it (`is_made`). `waits` is called again and again
    during the wait, with the other job. Raises OSError where the folder cannot be written to.
    """
    path = cache_dir / f".{key}.lock"
    descriptor = _locked(path, is_made, waits)
    try:
        if descriptor is not None:
            _remove_leftovers(cache_dir, key, is_locked=True)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()  # still locked: nobody else takes it for free
            os.close(descriptor)


def _locked(path: Path, is_made: Callable[[], bool], waits: Callable[[str], None]) -> int | None:
    """A locked descriptor of `path`; None where there are no locks, or nothing is left to do."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            if is_made():
                return None
            waits(holder or "another job")
            time.sleep(POLL_SECONDS)
            continue
        except OSError:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            return None
        if _is_at(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
        os.close(descriptor)


def make_once(
    folder: Path,
    fill: Callable[[Path], None],
    is_complete: Callable[[], bool],
    *,
    verb: str,
    log: Callable[[str], None],
    on_progress: OnProgress,
) -> bool:
    """Make a folder of the cache unless it is complete: one job makes it, the others wait.

    fill: writes its files into a folder with a temporary name; what it raises is passed on, and
    nothing is left behind. verb: what `fill` does, `tokenize`. Returns whether this job has made
    the folder. Raises OSError where the cache cannot be written to.
    """
    if is_complete():
        return False
    waited = False

    def waits(holder: str) -> None:
        nonlocal waited
        if not waited:
            log(f"data: waiting for {holder}, another job that makes {folder}")
        waited = True
        work = f"wait for another job to {verb}"
        on_progress(Progress(verb=work, fraction=None, detail=holder))

    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_maker(folder.parent, folder.name, is_complete, waits):
        if is_complete():
            return False
        if folder.exists():
            log(f"warning: the cached data in {folder} are damaged and are made again")
            remove(folder)
        scratch = scratch_folder(folder.parent, folder.name)
        try:
            fill(scratch)
            publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return True


def scratch_folder(cache_dir: Path, key: str) -> Path:
    """A new folder in which `key` is made."""
    _remove_leftovers(cache_dir, key, is_locked=False)
    scratch = cache_dir / f".{key}.{uuid4().hex}.tmp"
    scratch.mkdir()
    return scratch


def publish(scratch: Path, folder: Path) -> None:
    """Give a complete folder its name, unless another job was faster, with the same content."""
    (scratch / LEASE).touch()
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def remove(folder: Path) -> None:
    """Delete a folder: its name is free at once."""
    aside = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(cache_dir: Path, key: str, *, is_locked: bool) -> None:
    """Delete temporary folders of jobs that were killed: those of `key` when this job holds its
    lock, others when they are a day old."""
    for leftover in cache_dir.glob(f".{key}.*.tmp" if is_locked else ".*.tmp"):
        with suppress(OSError):
            if is_locked or time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink()
    for lock in () if is_locked else cache_dir.glob(".*.lock"):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > LEFTOVER_SECONDS:
                _unlink_unlocked(lock)


def _unlink_unlocked(lock: Path) -> None:
    """Delete the lock file of a job that was killed."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.unlink()
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Entry:
    folder: Path
    size: int
    """Bytes."""
    used: float
    """Time of the last use, in seconds since 1970."""


def make_room(cache_dir: Path, max_bytes: int, *, keep: Path, log: Callable[[str], None]) -> None:
    """Delete the folders that were not used for the longest time, until the cache has at most
    `max_bytes`; never `keep`, nor one in use. What is deleted is logged in one line."""
    entries = sorted(_entries(cache_dir), key=lambda entry: entry.used)
    total = sum(entry.size for entry in entries)
    removed: list[_Entry] = []
    for entry in entries:
        if total <= max_bytes:
            break
        if entry.folder != keep and _remove_unused(entry):
            removed.append(entry)
            total -= entry.size
    limit = f"data_cache.max_gb = {max_bytes / 1e9:g}"
    if removed:
        freed = sum(entry.size for entry in removed) / 1e9
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(removed[-1].used))
        log(
            f"data cache: {len(removed)} dataset(s) last used until {last} were deleted, "
            f"{freed:.3g} GB ({limit})"
        )
    if total > max_bytes:
        log(f"warning: the data cache {cache_dir} has {total / 1e9:.3g} GB in use ({limit})")


def _entries(cache_dir: Path) -> Iterator[_Entry]:
    for folder in cache_dir.iterdir():
        if not _KEY.fullmatch(folder.name) or folder.is_symlink():
            continue
        with suppress(OSError):
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
            if FACTS in sizes and "tokens.bin" in sizes:
                lease = folder / (LEASE if LEASE in sizes else FACTS)
                yield _Entry(folder, sum(sizes.values()), lease.stat().st_mtime)


def _remove_unused(entry: _Entry) -> bool:
    """Delete a folder unless a process uses it; whether it was deleted."""
    try:
        descriptor = os.open(entry.folder / LEASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # of another user
        return False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            if time.time() - entry.used < UNLOCKED_SECONDS:
                return False
        remove(entry.folder)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
