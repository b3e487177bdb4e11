"""Python's garbage collector during training: at known steps, on all ranks at the same ones.

By itself the collector runs after a number of allocations, on each rank at another moment, and the
step of all ranks waits for the slowest. Owns the rule for `gc_freq`: between the passes the
collector is off, and what there was when training began is not searched again. Afterwards it is as
it was before.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Collect = Callable[[int], None]
"""Called with the number of the step that has ended."""


@contextmanager
def collected_every(steps: int) -> Iterator[Collect]:
    """In this context the collector runs after each multiple of `steps`; 0: whenever Python
    decides. Gives what is called after each step, or after several at once."""
    if steps == 0:
        yield lambda step: None
        return
    was_enabled, freezes = gc.isenabled(), gc.get_freeze_count() == 0
    gc.collect()
    if freezes:  # else another part of the program did, and only it knows until when
        gc.freeze()
    gc.disable()
    try:
        yield _Collection(steps)
    finally:
        if freezes:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


class _Collection:
    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._passes: int | None = None
        """Multiples of `steps` so far; None before the first step."""

    def __call__(self, step: int) -> None:
        passes = step // self._steps
        if (self._passes is not None and passes > self._passes) or step % self._steps == 0:
            gc.collect()
        self._passes = passes
