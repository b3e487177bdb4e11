"""A line from the keyboard, during which Ctrl-C is never lost.

`input` loses a SIGINT in two places: in a hook of readline, whose exceptions are dropped, and
between printing the prompt and waiting for a key, where nothing looks at signals any more. The line
then ends at the next key only. Here a thread learns of every SIGINT (`signal.set_wakeup_fd`) and
interrupts the wait again until the line has ended.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_AGAIN = signal.SIGURG
"""Interrupts a wait, and is ignored by whoever does not handle it."""
_INTERVAL = 0.2
"""Seconds until the first signal after the user's: rather the second one than both at once."""
_END = b"\0"


def read_line(read: Callable[[], str]) -> str:
    """The line that `read`, a call of `input`, returns. Called by the main thread.

    Raises EOFError at the end of the input, KeyboardInterrupt at Ctrl-C.
    """
    return _Interruptible().run(read)


class _Interruptible:
    """One call of `input`."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._waits, self._is_pressed = True, False
        self._ended = threading.Event()

    def run(self, read: Callable[[], str]) -> str:
        signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        handlers = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, _AGAIN)
        }
        before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._repeat, args=(signals,), name="ctrl-c", daemon=True)
        thread.start()
        try:
            try:
                return read()
            except SystemError as error:  # a second signal while `input` raised for the first one
                if not self._is_pressed:
                    raise
                raise KeyboardInterrupt from error
            finally:
                self._waits = False
        finally:
            self._waits = False
            self._ended.set()
            signal.set_wakeup_fd(before)
            os.write(wakeup, _END)
            thread.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(signals)
            os.close(wakeup)

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        self._is_pressed |= number == signal.SIGINT
        if self._is_pressed and self._waits:
            raise KeyboardInterrupt

    def _repeat(self, signals: int) -> None:
        """In a thread: after a SIGINT, signal the main thread until the line has ended."""
        while signal.SIGINT not in (received := os.read(signals, 64)):
            if _END in received:
                return
        interval = _INTERVAL
        while not self._ended.wait(interval):
            signal.pthread_kill(self._main, _AGAIN)
            interval *= 2
