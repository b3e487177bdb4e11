"""The places where the host reads a value from the device, and so waits for all work before it.

Owns the list of them (`HOST_READS`) and their count. Kernels are queued ahead of their execution; a
read in the middle of a step waits until the queue is empty, and the next kernels start late.
Invariant: a step reads from the device inside of `host_read` only. Entering it costs less than a
microsecond. Tests run steps in a mode that fails at any other read (`tests/host_waits.py`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

HOST_READS: Mapping[str, str] = MappingProxyType({
    "step values": "once a step, at the end of its sink: loss, gradient norm, requests to stop",
    "loss scale": "once a step with a loss scale, in place of that for its values",
    "step limits": "once a step that limits may skip, in place of that for its values",
    "expert counts": "once a mixture layer with expert parallelism: rows sent to each rank and "
    "received; a recomputed layer uses those of its first pass",
    "group sizes": "once a grouped product that no kernel takes: the rows of each group",
    "reference": "once a global batch, before training on preferences: its log-probabilities",
    "evaluation": "once an evaluation set: its sums",
    "tokens": "once a generated token of a batch",
    "stop of one rank": "once a generated token of a batch that several ranks watch",
})  # fmt: skip
"""Every reason to read, to how often it happens."""


class _State(threading.local):
    """What this thread reads at present: backward passes run in threads of their own."""

    def __init__(self) -> None:
        self.reasons: list[str] = []


_state = _State()
_counts: Counter[str] = Counter()


class _HostRead:
    """The context manager of one reason; it may be entered by several threads."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __enter__(self) -> None:
        _counts[self.reason] += 1
        _state.reasons.append(self.reason)

    def __exit__(self, *exception: object) -> None:
        _state.reasons.pop()


_READS = {reason: _HostRead(reason) for reason in HOST_READS}


def host_read(reason: str) -> _HostRead:
    """Mark the block as one that reads from the device, for a reason of `HOST_READS`.

    KeyError for another one.
    """
    return _READS[reason]


def current_host_read() -> str | None:
    """The reason of the innermost block of `host_read` that this thread is in; None outside."""
    return _state.reasons[-1] if _state.reasons else None


@contextmanager
def counted_host_reads() -> Iterator[Counter[str]]:
    """A counter that holds, once the block has ended, the reads of all threads in it by reason."""
    before, found = Counter(_counts), Counter[str]()
    try:
        yield found
    finally:
        found.update(_counts - before)
