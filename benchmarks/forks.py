"""Ranks forked from one process that has imported everything: measured without their start-up.

Owns how a function is timed on several ranks at once. Every measure gets fresh processes, so that
memory is fresh too; the clock runs from the moment all of them are ready to the end of the last.
A virtual machine may give free memory back to its host, and getting it again costs ten times what
filling it does: memory `at_hand` is fetched before the clock starts, and let go as it starts.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Work = Callable[..., object]
"""(rank, ranks) -> anything; behind what `before` gave, where there is one."""
Before = Callable[[int, int], object]

MEMORY_LEFT = 1 << 30
"""Bytes that are left to others when memory is fetched."""

QUIET_SECONDS = 2.2
"""Free memory goes back to the host two seconds after some was let go:
https://docs.kernel.org/mm/free_page_reporting.html"""


@dataclass(frozen=True)
class Measured:
    """One measure of all ranks."""

    seconds: float
    peak_bytes: int
    """Resident memory at its highest, without what was there before: of the largest rank."""
    read_bytes: int
    """Asked of files by all ranks."""


def measure(
    work: Work, ranks: int, *, group: bool = False, before: Before | None = None, at_hand: int = 0
) -> Measured:
    """Run `work` on `ranks` forked processes. `group`: over gloo. `before` is done before the clock
    starts, and what it gives goes to `work` first. `at_hand`: bytes that it will ask the system
    for, of all ranks, new files in the page cache among them. Raises RuntimeError when a rank
    fails."""
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that holds what was imported
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store" if group else None
        children = [_fork(work, before, rank, ranks, store) for rank in range(ranks)]
        for _, ready, _ in children:
            os.read(ready, 1)
        fetch_memory(at_hand)
        started = time.perf_counter()
        for _, _, go in children:
            os.write(go, b"g")
        answers = [_answer(ready) for _, ready, _ in children]
        seconds = time.perf_counter() - started
        for child, ready, go in children:
            os.waitpid(child, 0)
            os.close(ready)
            os.close(go)
    if not all(answers):
        raise RuntimeError("a rank failed, see above")
    rows = [json.loads(answer) for answer in answers]
    return Measured(seconds, max(row[0] for row in rows), sum(row[1] for row in rows))


def _answer(ready: int) -> bytes:
    """What a rank says before it ends; the clock stops at its newline."""
    text = b""
    while not text.endswith(b"\n"):
        part = os.read(ready, 4096)
        if not part:
            return b""
        text += part
    return text


def _fork(
    work: Work, before: Before | None, rank: int, ranks: int, store: Path | None
) -> tuple[int, int, int]:
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    child = os.fork()
    if child:
        os.close(ready_write)
        os.close(go_read)
        return child, ready_read, go_write
    try:
        if store is not None:
            import torch.distributed as dist

            file_store = dist.FileStore(str(store), ranks)
            dist.init_process_group("gloo", store=file_store, rank=rank, world_size=ranks)
        given = () if before is None else (before(rank, ranks),)
        os.write(ready_write, b"r")
        os.read(go_read, 1)
        Path("/proc/self/clear_refs").write_text("5")
        resident, read = _memory("VmRSS"), _read_bytes()
        kept = work(*given, rank, ranks)
        row = [_memory("VmHWM") - resident, _read_bytes() - read]
        os.write(ready_write, json.dumps(row).encode() + b"\n")
        del kept
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def fetch_memory(nbytes: int) -> None:
    """See to it that `nbytes`, or what there is, can be had from the system at once, for the next
    two seconds at least. Only free memory is: what the page cache holds stays there."""
    nbytes = min(nbytes, _memory("MemFree", "/proc/meminfo") - MEMORY_LEFT)
    if nbytes <= 0:
        return
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, nbytes, mmap.PAGESIZE):
        memory[start] = 1
    time.sleep(QUIET_SECONDS)
    memory.close()


def _memory(field: str, file: str = "/proc/self/status") -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field}")


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def forget(folders: Iterable[Path]) -> None:
    """Drop the files of `folders` from the page cache."""
    os.sync()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
