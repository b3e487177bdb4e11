"""`run.py` at a pseudo-terminal: a test types, and waits for what it prints."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from tests.ranks import PATIENCE, _context, free_port

CTRL_C, CTRL_D = "\x03", "\x04"


class TerminalJob:
    """A job whose rank 0 has a terminal; other ranks have none."""

    def __init__(self, arguments: Sequence[str], folder: Path, world_size: int = 1) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(self._master, (50, 200))
        name, port = os.ttyname(slave), free_port()
        given = [(name if rank == 0 else "", rank, world_size, port) for rank in range(world_size)]
        self._processes = [
            _context().Process(target=_started, args=(list(arguments), str(folder), *of_rank))
            for of_rank in given
        ]
        for process in self._processes:
            process.start()
        self._slave = slave
        self._bytes = b""
        self._seen = 0

    @property
    def output(self) -> str:
        """Everything printed so far, the echo of the keyboard included."""
        return self._bytes.decode()

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def expect(self, text: str) -> None:
        """Wait until `text` is printed, after what was expected before."""
        sought, deadline = text.encode(), time.monotonic() + PATIENCE
        while (at := self._bytes.find(sought, self._seen)) < 0:
            waits = self._processes[0].is_alive() and time.monotonic() < deadline
            found = self._read(0.5)
            assert found or waits, f"{text!r} is not in {self._bytes[self._seen :].decode()}"
        self._seen = at + len(sought)

    def end(self) -> list[int]:
        """Wait for the end; the exit codes of the ranks."""
        for process in self._processes:
            while process.is_alive():
                self._read(0.05)
            process.join()
        while self._read(0):
            pass
        os.close(self._slave)
        os.close(self._master)
        return [process.exitcode for process in self._processes]

    def kill(self) -> None:
        """End what is still running."""
        for process in self._processes:
            if process.is_alive():
                process.kill()

    def _read(self, timeout: float) -> bool:
        if not select.select([self._master], [], [], timeout)[0]:
            return False
        self._bytes += os.read(self._master, 65536)
        return True


def _started(
    arguments: list[str], folder: str, terminal: str, rank: int, world_size: int, port: int
) -> None:
    from launcher.cli import leave, main

    os.chdir(folder)
    os.environ["TERM"] = "dumb"  # no control sequences of the editor of lines
    if world_size > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    if terminal:
        os.setsid()
        file = os.open(terminal, os.O_RDWR)  # the first one that a session opens controls it
        for descriptor in (0, 1, 2):
            os.dup2(file, descriptor)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    else:
        log = os.open(f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    leave(main(arguments, owns_process=world_size == 1))
