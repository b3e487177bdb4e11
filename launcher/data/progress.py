"""How far the preparation of a dataset is: the part of the bytes that was read, tokens a second,
time left.

Owns the measuring and its words, not where they are shown. Bytes are counted where files are opened
(`encoding.open_file`) while a meter is active, compressed ones as they are on disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

FIRST_SECONDS = 2.0
"""Work that ends sooner reports nothing."""
REPORT_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report."""

    verb: str
    """What is done with the data: `tokenize`, `read`."""
    fraction: float | None
    """From 0 to 1; None where it is not known."""
    detail: str
    """`35 %, 1.2M tokens/s, about 2 min left`."""

    @property
    def gerund(self) -> str:
        """`tokenizing` for `tokenize`, `waiting for another job` for `wait for another job`."""
        word, space, rest = self.verb.partition(" ")
        return f"{word.removesuffix('e')}ing{space}{rest}"


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """For callers that show nothing."""


class Meter:
    """Counts bytes and tokens, and reports a few times a second. Several threads may count."""

    def __init__(self, verb: str, total_bytes: int, report: OnProgress) -> None:
        self.tokens = 0
        self._verb, self._total, self._report = verb, total_bytes, report
        self._finished = self._inside = 0
        self._lock = threading.Lock()
        self._started = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes of the present file."""
        with self._lock:
            self._inside += count
        self.tick()

    def finish_file(self, size: int) -> None:
        """The present file, of `size` bytes, was read, by whatever means."""
        self._finished += size
        self._inside = 0

    @property
    def fraction(self) -> float:
        """The part of all bytes that was read."""
        return min((self._finished + self._inside) / max(self._total, 1), 1.0)

    def tick(self) -> None:
        """Report, unless the last report was just now."""
        now = time.monotonic()
        with self._lock:
            if now - self._started < FIRST_SECONDS or now - self._last < REPORT_SECONDS:
                return
            self._last = now
        seconds, fraction = max(now - self._started, 1e-9), self.fraction
        parts = [f"{int(100 * fraction)} %"]
        if self.tokens:
            parts.append(f"{short(self.tokens / seconds)} tokens/s")
        if fraction > 0:
            parts.append(f"{about(seconds * (1 - fraction) / fraction)} left")
        self._report(Progress(verb=self._verb, fraction=fraction, detail=", ".join(parts)))


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextmanager
def counting_bytes(meter: Meter) -> Iterator[None]:
    """Count the bytes that this thread reads from data files."""
    before = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(before)


def active_meter() -> Meter | None:
    """The meter of this thread."""
    return _METER.get()


def short(number: float) -> str:
    """`1.2M`, `35k`, `812`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.1f}{letter}" if scaled < 10 else f"{scaled:.0f}{letter}"
    return f"{number:.0f}"


def about(seconds: float) -> str:
    """`about 40 s`, `about 2 min`, `about 3 h`."""
    if seconds < 90:
        return f"about {max(round(seconds), 1)} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
