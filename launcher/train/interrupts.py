"""Interrupts: SIGINT and SIGTERM make a run save and stop after the present step.

The process itself may request the same (`request`). Invariant: the first signal is only recorded,
so no step is cut short; a second one ends the process at once. Under torchrun one Ctrl-C reaches a
process twice, from the terminal and from the agent: signals within `ECHO_SECONDS` of the first
count as the same one.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUEST = -1
"""In place of the number of a signal: a request by the process itself."""
STOP_REASONS = (*SIGNALS, REQUEST)
ECHO_SECONDS = 2.0


class Interrupted(Exception):
    """Training was stopped by one of `STOP_REASONS`, after a checkpoint was saved where one is
    configured."""

    def __init__(self, number: int) -> None:
        self.number = number
        requested = number == REQUEST
        super().__init__("a request to stop" if requested else signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as in shells: 130 or 143. 0 after a request: the run did
        not fail, so nothing should restart it."""
        return 0 if self.number == REQUEST else 128 + self.number


class Interrupts:
    """Records signals while the loop runs: `with Interrupts() as interrupts: ...`."""

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._is_requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def request(self) -> None:
        """Stop after the next step."""
        self._is_requested = True

    def as_values(self) -> list[float]:
        """0 or 1 for each of `STOP_REASONS` on this rank; ranks sum them."""
        signals = [float(self.received == number) for number in SIGNALS]
        return [*signals, float(self._is_requested)]
