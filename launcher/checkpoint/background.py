"""Background: one piece of work beside training, in a thread that yields to it.

Owns the thread of asynchronous saves. It has the lowest priority a thread can ask for (those it
starts inherit it), so that it takes the time a step leaves. It does not keep the process from
ending: a save that is cut off there was never published.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

Result = TypeVar("Result")
NICEST = 19


class Background(Generic[Result]):
    """Does one piece of work at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Result | None, BaseException | None] = (None, None)

    @property
    def is_busy(self) -> bool:
        """Whether there is work whose outcome was not asked for yet."""
        return self._thread is not None

    @property
    def is_done(self) -> bool:
        """Whether its outcome is there, without waiting."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, work: Callable[[], Result]) -> None:
        """Begin `work`. The outcome of the work before it must have been asked for."""
        if self._thread is not None:
            raise RuntimeError("there is work whose outcome was not asked for")
        self._thread = threading.Thread(target=self._run, args=(work,), name="save", daemon=True)
        self._thread.start()

    def finish(self, timeout_seconds: float | None = None) -> Result:
        """Wait for the work and give what it gave, or raise what it raised.

        Raises `TimeoutError` when it is still going on after `timeout_seconds`.
        """
        if self._thread is None:
            raise RuntimeError("there is no work")
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"still going on after {timeout_seconds:.0f} s")
        self._thread = None
        (result, error), self._outcome = self._outcome, (None, None)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _run(self, work: Callable[[], Result]) -> None:
        if sys.platform == "linux":  # where a priority belongs to a thread
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICEST)
        try:
            self._outcome = (work(), None)
        except BaseException as error:
            self._outcome = (None, error)
