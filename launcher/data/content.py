"""What data files contain, as hashes, without reading an unchanged file again.

Owns the memo `content_hashes.json` of a cache folder: for each path the xxh3 hash of all its bytes,
and the status (device, inode, size, times of change) that the file had. A file with the same status
is not read again; any other one is, since a file that was touched, moved or copied has the same
content and a file that was edited has not. The time of the last status change (ctime) is compared
too, which a program cannot set back as it can the modification time.

Invariant: a status that was seen within `SETTLE_SECONDS` of the change is not kept, as a second
change within the resolution of the file system's clock would look the same (as git does it).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from xxhash import xxh3_128

from launcher.data.files import DataFile, unreadable
from launcher.data.progress import Meter, OnProgress

MEMO = "content_hashes.json"
SETTLE_SECONDS = 2.0
MAX_ENTRIES = 1_000_000
_THREADS = 4
_BLOCK = 1 << 22

Status = list[int]


def content_hashes(
    files: Sequence[DataFile], cache_dir: Path, on_progress: OnProgress
) -> list[str]:
    """The hash of the bytes of each file, in order. Raises UserError for one that cannot be read.

    The memo in `cache_dir` is read and completed; a memo that cannot be written is no error.
    """
    memo = _read_memo(cache_dir)
    paths = [os.path.realpath(file.path) for file in files]
    found: dict[str, str] = {}
    unknown: dict[str, DataFile] = {}
    for path, file in zip(paths, files, strict=True):
        entry = memo.get(path)
        if entry is not None and entry[1] == _status(file.path):
            found[path] = entry[0]
        else:
            unknown[path] = file
    if unknown:
        meter = Meter("read", sum(file.size for file in unknown.values()), on_progress)
        with ThreadPoolExecutor(_THREADS) as pool:
            hashed = pool.map(lambda file: _hashed(file.path, meter), unknown.values())
            entries = dict(zip(unknown, hashed, strict=True))
        found |= {path: digest for path, (digest, _) in entries.items()}
        kept = {path: entry for path, entry in entries.items() if _is_old_enough(entry[1])}
        _write_memo(cache_dir, kept)
    return [found[path] for path in paths]


def _hashed(path: Path, meter: Meter) -> tuple[str, Status]:
    """The hash of a file and the status it had before it was read."""
    status = _status(path)
    digest = xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                meter.add(len(block))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest(), status


def _status(path: Path) -> Status:
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _is_old_enough(status: Status) -> bool:
    return time.time_ns() - max(status[3:]) > SETTLE_SECONDS * 1e9


def _read_memo(cache_dir: Path) -> dict[str, tuple[str, Status]]:
    """The entries of the memo; a damaged one is empty."""
    try:
        entries: Any = json.loads((cache_dir / MEMO).read_text())
        return {
            str(path): (str(digest), list(status)) for path, (digest, status) in entries.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write_memo(cache_dir: Path, added: dict[str, tuple[str, Status]]) -> None:
    """Add entries. Two jobs at once may lose some, whose files are then read again."""
    if not added:
        return
    entries = {**_read_memo(cache_dir), **added}
    while len(entries) > MAX_ENTRIES:
        entries.pop(next(iter(entries)))
    scratch = cache_dir / f".{MEMO}.{uuid4().hex}.tmp"
    with suppress(OSError):
        try:
            scratch.write_text(json.dumps(entries))
            scratch.replace(cache_dir / MEMO)
        finally:
            scratch.unlink(missing_ok=True)
