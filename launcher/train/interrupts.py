"""Interrupts: SIGINT and SIGTERM become a wish to save and stop at the next step boundary.

A wish may also come from within the process (`request`), and leaves signals their meaning.
Invariant: the first signal only leaves a note, so no step is cut in half; a second one ends the
process at once. Under torchrun one Ctrl-C reaches a process twice, from the terminal and from the
agent: signals within `ECHO_SECONDS` of the first are the same request.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUEST = -1
"""Stands among the numbers of signals for a wish from within."""
STOP_REASONS = (*SIGNALS, REQUEST)
ECHO_SECONDS = 2.0


class Interrupted(Exception):
    """Training was stopped by one of `WISHES`, after a checkpoint was saved where one is
    configured."""

    def __init__(self, number: int) -> None:
        self.number = number
        asked = number == REQUEST
        super().__init__("a request to end" if asked else signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it: 130 or 143. 0 after a request: the
        run did what it was to do, and whoever restarts failed jobs leaves it alone."""
        return 0 if self.number == REQUEST else 128 + self.number


class Interrupts:
    """Notes signals while the loop runs: `with Interrupts() as interrupts: ...`."""

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._is_requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def request(self) -> None:
        """Wish to stop, from within."""
        self._is_requested = True

    def as_values(self) -> list[float]:
        """What this rank asks for, one 0 or 1 for each of `WISHES`; ranks add them up."""
        signals = [float(self.received == number) for number in SIGNALS]
        return [*signals, float(self._is_requested)]
