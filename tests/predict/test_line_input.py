"""Ctrl-C while a line is read, at the moments at which `input` loses it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection

import pytest

from launcher.predict.line_input import read_line


def press_in_hook() -> None:
    """In a hook of readline, which drops the KeyboardInterrupt: nothing else will end the line."""
    import readline

    readline.set_pre_input_hook(lambda: os.kill(os.getpid(), signal.SIGINT))


def press_while_it_waits() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()


def _read(terminal: str, press: object, answer: Connection) -> None:
    os.setsid()
    os.dup2(os.open(terminal, os.O_RDWR), 0)
    os.dup2(0, 1)
    import readline  # noqa: F401
    import sys

    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    before = signal.getsignal(signal.SIGINT)
    callable(press) and press()
    try:
        answer.send(read_line(lambda: input("> ")))
    except KeyboardInterrupt:
        answer.send(KeyboardInterrupt)
    answer.send((signal.getsignal(signal.SIGINT) is before, signal.set_wakeup_fd(-1)))


@pytest.mark.parametrize("press", [press_in_hook, press_while_it_waits, None])
def test_no_ctrl_c_is_lost(press: object) -> None:
    master, slave = os.openpty()
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_read, args=(os.ttyname(slave), press, theirs)
    )
    process.start()
    if press is None:
        os.write(master, b"a line\r")
    try:
        assert mine.recv() == ("a line" if press is None else KeyboardInterrupt)
        assert mine.recv() == (True, -1), "handlers are as before"
    finally:
        process.kill()
        process.join()
        os.close(master)
        os.close(slave)
