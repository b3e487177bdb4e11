"""Two machines for tests: folders of their own, forked ranks, and a store as a launcher serves it.

The ranks of a machine run in its folder as `run.py` does, so that relative paths are private to it.
Nothing but the store and the connections of the ranks joins the machines; no launcher ends a rank.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from tests.ranks import PATIENCE, _context, free_port

NODES = ("a", "b")
PER_NODE = 2


@dataclass(frozen=True)
class Ended:
    """What became of a job."""

    codes: list[int | None]
    """Exit code of each rank; negative: a signal."""
    output: list[str]
    """What each rank printed."""
    seconds: list[float]
    """From the first end to the end of each rank."""


class Job:
    """A job of four ranks on two machines, below `folder`."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.port = free_port()
        self._store = dist.TCPStore(
            "127.0.0.1", self.port, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE),
        )  # fmt: skip
        self._logs = [folder / f"rank_{rank}.log" for rank in range(len(NODES) * PER_NODE)]
        for log in self._logs:
            log.write_text("")
        self.processes: list[BaseProcess] = [
            _context().Process(target=_rank, args=(rank, self.port, str(folder), arguments))
            for rank in range(len(self._logs))
        ]
        for process in self.processes:
            process.start()

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self._logs[rank].read_text()

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Wait until a rank prints `text`."""
        while text not in self.output(rank):
            assert self.processes[rank].is_alive(), self.output(rank)
            time.sleep(0.02)

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for all ranks; those left after `patience` seconds are killed, with code None."""
        deadline, ends = time.monotonic() + patience, dict[int, float]()
        while len(ends) < len(self.processes) and time.monotonic() < deadline:
            for rank, process in enumerate(self.processes):
                if rank not in ends and not process.is_alive():
                    ends[rank] = time.monotonic()
            time.sleep(0.02)
        codes = [p.exitcode if rank in ends else None for rank, p in enumerate(self.processes)]
        for process in self.processes:
            process.kill()
        first = min(ends.values(), default=0.0)
        return Ended(
            codes, [self.output(rank) for rank in range(len(codes))],
            [ends.get(rank, deadline) - first for rank in range(len(codes))],
        )  # fmt: skip


def _rank(rank: int, port: int, folder: str, arguments: list[str]) -> None:
    size = len(NODES) * PER_NODE
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank % PER_NODE),
        LOCAL_WORLD_SIZE=str(PER_NODE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1", SLIPWAY_WORKER_LOG=folder,
    )  # fmt: skip
    log = os.open(Path(folder, f"rank_{rank}.log"), os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(Path(folder, NODES[rank // PER_NODE]))
    import torch

    from launcher.cli import leave, main

    torch.set_num_threads(1)
    leave(main(arguments, owns_process=True))
