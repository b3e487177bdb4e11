"""Background: the threads of asynchronous saves.

They have the lowest scheduling priority (threads that they start inherit it), so that training goes
first. They are daemon threads: a save that is interrupted at the end of the process was never
published.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

Result = TypeVar("Result")
LOWEST_PRIORITY = 19


class Background(Generic[Result]):
    """Runs one function at a time in a thread."""

    def __init__(self, name: str = "save") -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Result | None, BaseException | None] = (None, None)

    @property
    def is_busy(self) -> bool:
        """Whether a function was started whose result was not taken."""
        return self._thread is not None

    @property
    def is_done(self) -> bool:
        """Whether its result is available without waiting."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, work: Callable[[], Result]) -> None:
        """Start `work`. The result of the last one must have been taken."""
        if self._thread is not None:
            raise RuntimeError("the result of the last function was not taken")
        self._thread = threading.Thread(
            target=self._run, args=(work,), name=self._name, daemon=True
        )
        self._thread.start()

    def finish(self, timeout_seconds: float | None = None) -> Result:
        """Wait for the function, and return its result or raise its exception.

        Raises `TimeoutError` when it is still running after `timeout_seconds`.
        """
        if self._thread is None:
            raise RuntimeError("nothing was started")
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"still running after {timeout_seconds:.0f} s")
        self._thread = None
        (result, error), self._outcome = self._outcome, (None, None)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _run(self, work: Callable[[], Result]) -> None:
        if sys.platform == "linux":  # where each thread has a priority
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        try:
            self._outcome = (work(), None)
        except BaseException as error:
            self._outcome = (None, error)
