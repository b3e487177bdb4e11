"""Garbage: none is looked for while thousands of boxes are made that all stay.

Owns when Python's collector rests. Plans are tuples without cycles, so that a collection finds
nothing, and takes longer the more a process has imported.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def none_collected() -> Iterator[None]:
    """The collector rests, and does again what it did before. Also a decorator of functions."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
