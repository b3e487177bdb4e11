"""Killing: runs that end by SIGKILL at a chosen file operation of their saves.

Owns the fault points. They are injected into file operations (`os.pwrite`, `os.fsync`, `os.replace`
and so on) below the folder of checkpoints, without changes to the code under test. The ranks are
forked from the server of `tests.ranks`, so that a run starts quickly.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.ranks import PATIENCE, _context, free_port

OPERATIONS = ("pwrite", "fsync", "replace", "rename", "unlink", "mkdir", "open")
NUMBERS = re.compile(r"rank_\d+|-\d+_\d+|_\d+\.")


@dataclass(frozen=True)
class Fault:
    """Kill rank `rank` at its `index`-th operation (from 0)."""

    rank: int
    index: int
    moment: str = "before"
    """`before` it, `after` it, or `half`: after half of the bytes of a write."""


@dataclass(frozen=True)
class Operation:
    """A file operation of a run on its checkpoints."""

    name: str
    path: str
    """Relative to the folder of checkpoints."""

    @property
    def kind(self) -> str:
        """The operation and the role of the file, without rank and step."""
        return f"{self.name} {NUMBERS.sub('*', self.path)}"


class Watch:
    """Counts the operations below `root` and injects a fault."""

    def __init__(self, root: Path, fault: Fault | None) -> None:
        self.root = str(root)
        self.fault = fault
        self.seen: list[Operation] = []
        self._lock = threading.Lock()

    def install(self) -> None:
        """Wrap the functions of the `os` module."""
        for name in OPERATIONS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        plain_open = io.open

        def watched_open(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            if "w" not in mode and "a" not in mode:
                return plain_open(file, mode, *more, **options)
            return self._do("open", os.fspath(file), plain_open, (file, mode, *more), options)

        io.open = watched_open  # type: ignore[assignment]

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(target: Any, *more: Any, **options: Any) -> Any:
            if name == "open" and not more[0] & os.O_CREAT:
                return original(target, *more, **options)
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            return self._do(name, os.fspath(path), original, (target, *more), options)

        return operation

    def _do(self, name: str, path: str, original: Callable[..., Any], arguments: Any,
            options: Any) -> Any:  # fmt: skip
        path = os.path.abspath(path)
        if not path.startswith(self.root):
            return original(*arguments, **options)
        with self._lock:
            index = len(self.seen)
            self.seen.append(Operation(name, os.path.relpath(path, self.root)))
            is_last = self.fault is not None and index == self.fault.index
        if not is_last:
            return original(*arguments, **options)
        assert self.fault is not None
        try:
            if self.fault.moment == "half" and name == "pwrite":
                descriptor, content, position = arguments
                original(descriptor, content[: len(content) // 2], position)
            elif self.fault.moment == "after":
                original(*arguments, **options)
        finally:  # also after an error, as mkdir raises where it has to create parents first
            os.kill(os.getpid(), signal.SIGKILL)
        return None


def place(folder: Path, rank: int, world_size: int, filesystems: int) -> Path:
    """The current directory of a rank: one for all, or one for each file system."""
    return folder if filesystems == 1 else folder / f"disk_{rank * filesystems // world_size}"


def operations(
    folder: Path, arguments: Sequence[str], world_size: int, filesystems: int = 1
) -> list[list[Operation]]:
    """The file operations of each rank in a run without faults."""
    codes = _run(folder, arguments, world_size, None, filesystems=filesystems)
    places = [place(folder, rank, world_size, filesystems) for rank in range(world_size)]
    assert codes == [0] * world_size, (places[0] / "rank_0.log").read_text()
    rows = [json.loads((at / f"operations_{r}.json").read_text()) for r, at in enumerate(places)]
    return [[Operation(*row) for row in done] for done in rows]


def run_killed(
    folder: Path, arguments: Sequence[str], world_size: int, fault: Fault, filesystems: int = 1
) -> None:
    """A run with `fault`; the other ranks are killed afterwards."""
    codes = _run(folder, arguments, world_size, fault, filesystems=filesystems)
    log = place(folder, fault.rank, world_size, filesystems) / f"rank_{fault.rank}.log"
    assert codes[fault.rank] == -signal.SIGKILL, log.read_text()


def run_killed_after(
    folder: Path, arguments: Sequence[str], world_size: int, seconds: float
) -> bool:
    """A run whose ranks are all killed `seconds` after the first save began. Returns whether it
    was still running."""
    return -signal.SIGKILL in _run(folder, arguments, world_size, None, after=seconds)


def _run(
    folder: Path, arguments: Sequence[str], world_size: int, fault: Fault | None,
    after: float | None = None, filesystems: int = 1,
) -> list[int]:  # fmt: skip
    context, port = _context(), free_port()
    processes = [
        context.Process(
            target=_rank,
            args=(
                rank,
                world_size,
                port,
                str(place(folder, rank, world_size, filesystems)),
                list(arguments),
                fault,
            ),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    if after is not None:
        while not (folder / "output/checkpoint/manifest").is_dir() and processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(after)
    elif fault is not None:
        wait([processes[fault.rank].sentinel], PATIENCE)
    for process in processes:
        if fault is None and after is None:
            process.join(PATIENCE)
        process.kill()
    for process in processes:
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def _rank(
    rank: int, world_size: int, port: int, folder: str, arguments: list[str], fault: Fault | None
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    from launcher.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    log = os.open(f"rank_{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    own = fault if fault is not None and fault.rank == rank else None
    watch = Watch(Path(folder, "output", "checkpoint"), own)
    watch.install()
    code = main(arguments)
    rows = [[operation.name, operation.path] for operation in watch.seen]
    Path(f"operations_{rank}.json").write_text(json.dumps(rows))
    os._exit(code)
