"""Python's garbage collector, paused while thousands of boxes are made that all stay alive.

Plans are tuples without cycles: a collection frees nothing, and takes longer the more modules a
process has imported.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_resting: list[bool] = []
"""One entry for each active pause, in any thread: whether the collector was enabled before all."""


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable the collector until the last active pause ends; then restore its state from before
    the first. Also a decorator of functions."""
    with _lock:
        _resting.append(_resting[0] if _resting else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            if _resting.pop() and not _resting:
                gc.enable()
