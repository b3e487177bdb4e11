"""Values that a recomputed forward pass takes over from the first one.

Owns the memory of a checkpointed function: what it read from the device, and what it received from
other ranks to do so, in the order of the reads. Invariant: a function that is run again for its
backward pass reads nothing again. A run in the backward pass may end early, once everything is
recomputed that is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from launcher.parallel.kept_results import unselected

T = TypeVar("T")


class _Memory:
    """The values of one call of a checkpointed function."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.is_complete = False
        """Whether the first run has ended."""
        self.next = 0


class _Current(threading.local):
    """The memory of the function that this thread runs: backward passes have their own threads."""

    memory: _Memory | None = None


_current = _Current()


def remembered(read: Callable[[], T]) -> T:
    """`read()`; in a run of the backward pass what it gave in the first run."""
    memory = _current.memory
    if memory is not None and memory.is_complete:
        memory.next += 1
        value: T = memory.values[memory.next - 1]
        return value
    with unselected():  # later runs do not have these operations
        value = read()
    if memory is not None:
        memory.values.append(value)
    return value


def is_repeated() -> bool:
    """Whether this thread runs a function again, for its backward pass."""
    return _current.memory is not None and _current.memory.is_complete


def remembering(function: Callable[..., T]) -> Callable[..., T]:
    """`function` for one call of `torch.utils.checkpoint`, which runs it in the forward pass and
    again in the backward pass."""
    memory = _Memory()

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> T:
        before, _current.memory = _current.memory, memory
        memory.next = 0
        try:
            return function(*arguments, **keywords)
        finally:
            _current.memory, memory.is_complete = before, True

    return run
