"""Real ranks for tests: processes forked after the imports, joined by gloo.

Starting Python and importing torch costs seconds a process. A fork server imports once; each rank
is a fork of it (8 ranks up and down in well under a second). The function a rank runs must be
importable: a module-level function of a test file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PATIENCE = 1200.0
"""Seconds after which ranks hang: far beyond what a loaded machine needs."""


def _context() -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = PATIENCE
) -> list[Any]:
    """`function(*arguments)` in `world_size` processes; their results in rank order.

    Raises AssertionError with the traceback of the first rank that failed.
    """
    context = _context()
    port = free_port()
    pairs = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(
            target=_rank_main,
            args=(rank, world_size, port, pairs[rank][1], function, arguments),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for _, sender in pairs:
        sender.close()
    try:
        outcomes = _receive([receiver for receiver, _ in pairs], timeout)
    finally:
        for process in processes:
            process.join(2)
            if process.is_alive():
                process.kill()
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in outcomes]


def _receive(receivers: Sequence[Connection], timeout: float) -> list[tuple[bool, Any]]:
    """What every rank says. Once one has failed the others, who may wait for it, get a moment."""
    outcomes: list[tuple[bool, Any]] = [(False, "no answer in time")] * len(receivers)
    waiting = list(receivers)
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for receiver in wait(waiting, left):
            assert isinstance(receiver, Connection)
            waiting.remove(receiver)
            try:
                outcome = receiver.recv()
            except EOFError:
                outcome = False, "the process died"
            outcomes[receivers.index(receiver)] = outcome
            if not outcome[0]:
                deadline = min(deadline, time.monotonic() + 3)
    return outcomes


def _rank_main(
    rank: int, world_size: int, port: int, sender: Connection, function: Any, arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        outcome: tuple[bool, Any] = (True, function(*arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    sender.send(outcome)
    sender.close()
    sys.stdout.flush()
    os._exit(0)


def free_port() -> int:
    """A TCP port nobody listens on, and that the system gives to no connection meanwhile: those it
    picks itself begin at 32768."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


@dataclass(frozen=True)
class JobResult:
    """What a launched job left: exit code of every rank, and what rank 0 printed."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def code(self) -> int:
        """The exit code of the job: that of the first rank that failed."""
        return next((code for code in self.codes if code), 0)


def run_job(
    arguments: Sequence[str], folder: Path, world_size: int = 1, *, draws: bool = False
) -> JobResult:
    """`run.py` with `arguments` on `world_size` ranks, in `folder` as the current directory.

    `draws`: loss.png is a picture, not an empty file.
    """
    outputs = run_ranks(world_size, _job, list(arguments), str(folder), draws)
    return JobResult([code for code, _, _ in outputs], outputs[0][1], outputs[0][2])


@dataclass(frozen=True)
class StartedJob:
    """`run.py` as a process of its own that takes signals, but is forked: Python is warm."""

    process: Any
    log: Path

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit code, and what it printed."""
        self.process.join()
        return self.process.exitcode, self.log.read_text()


def start_job(arguments: Sequence[str], folder: Path) -> StartedJob:
    """`run.py` with `arguments` alone in `folder`, while the test goes on."""
    log = folder / "job.log"
    process = _context().Process(target=_started, args=(list(arguments), str(folder), str(log)))
    process.start()
    return StartedJob(process, log)


def _started(arguments: list[str], folder: str, log: str) -> None:
    from launcher.cli import leave, main

    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    leave(main(arguments, owns_process=True))


def _job(arguments: list[str], folder: str, draws: bool = False) -> tuple[int, str, str]:
    import io

    from launcher import cli

    cli.ECHO_DELAY_SECONDS = 0.0  # nobody ends the other ranks when rank 0 has reported
    if draws:
        from tests.warm import draw_for_real

        draw_for_real()
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()
