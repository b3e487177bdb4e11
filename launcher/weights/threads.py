"""Threads that read and write; after a failure no further work is started."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> list[Result]:
    """`function` of every item, in order of the items. After a failure no further item is started,
    and the first error is raised."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            with _interrupts_deferred():
                futures = [pool.submit(function, item) for item in items]
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """SIGINT arrives after the block. While the pool starts a thread, KeyboardInterrupt would leave
    a thread that the pool does not know and does not wait for, and that goes on writing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
