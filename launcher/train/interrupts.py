"""Interrupts: SIGINT and SIGTERM become a request to save and stop at the next step boundary.

Invariant: the first signal only leaves a note, so no step is cut in half; a second one ends the
process at once, as it would have without us.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    def as_values(self) -> list[float]:
        """What this rank asks for, one 0 or 1 for each of `SIGNALS`; ranks add them up."""
        return [float(self.received == number) for number in SIGNALS]
