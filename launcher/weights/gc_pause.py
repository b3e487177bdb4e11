"""Garbage: none is looked for while thousands of boxes are made that all stay.

Owns when Python's collector rests. Plans are tuples without cycles, so that a collection finds
nothing, and takes longer the more a process has imported.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_resting: list[bool] = []
"""For each that is inside, in any thread: whether the collector worked before them all."""


@contextmanager
def gc_paused() -> Iterator[None]:
    """The collector rests until the last one has left, and does again what it did before the first.
    Also a decorator of functions."""
    with _lock:
        _resting.append(_resting[0] if _resting else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            if _resting.pop() and not _resting:
                gc.enable()
