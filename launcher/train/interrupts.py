"""Interrupts: SIGINT and SIGTERM become a request to save and stop at the next step boundary.

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
ECHO_SECONDS = 2.0


class Interrupted(Exception):
    """Training was stopped by a signal, after a checkpoint was saved where one is configured."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it: 130 or 143."""
        return 128 + self.number


class Interrupts:
    """Notes signals while the loop runs: `with Interrupts() as interrupts: ...`."""

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
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

    def request(self, number: int = signal.SIGTERM) -> None:
        """Note a wish to stop, as if signal `number` had come."""
        self.received = self.received or number

    def as_values(self) -> list[float]:
        """What this rank asks for, one 0 or 1 for each of `SIGNALS`; ranks add them up."""
        return [float(self.received == number) for number in SIGNALS]
