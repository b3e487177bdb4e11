"""A device whose copies are as late as its streams allow, in the memory of the host.

A copy that is queued on a stream is not made before somebody waits for an event behind it. What
changes a source, or uses a target, without waiting therefore gives other values, as on a GPU that
is slow at the wrong moment. `calls` has what was called, by which thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.streams import Streams


class Call(NamedTuple):
    what: str
    thread: str
    detail: int = 0
    """Bytes of a copy, or of memory that is registered; the number of an event."""


class Stream:
    def __init__(self) -> None:
        self.queued: list[Callable[[], None]] = []
        self.done = 0


class Event(NamedTuple):
    stream: Stream
    position: int
    number: int


class LateStreams(Streams):
    is_device = True

    def __init__(self, *, register: Callable[[int, int], bool] = lambda address, nbytes: True):
        self.calls: list[Call] = []
        self.registered: dict[int, int] = {}
        """Address of pinned memory to its bytes."""
        self._register = register
        self._lock = threading.RLock()
        self._events = 0
        self._streams: list[Stream] = []

    def whats(self) -> list[str]:
        return [call.what for call in self.calls]

    def threads(self, what: str) -> set[str]:
        return {call.thread for call in self.calls if call.what == what}

    def enter_thread(self) -> None:
        self._log("enter")

    def new_stream(self) -> Stream:
        self._streams.append(Stream())
        return self._streams[-1]

    @property
    def pending(self) -> int:
        """Copies that nobody has waited for."""
        return sum(len(stream.queued) - stream.done for stream in self._streams)

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        with _Late(self, stream):
            yield

    def wait_for_current(self, stream: Stream) -> None:
        self._log("wait for current")

    def record_event(self, stream: Stream) -> Event:
        with self._lock:
            self._events += 1
            self._log("record", self._events)
            return Event(stream, len(stream.queued), self._events)

    def current_waits(self, event: Event) -> None:
        self._log("current waits", event.number)
        self._reach(event)

    def synchronize(self, event: Event) -> None:
        self._log("synchronize", event.number)
        self._reach(event)

    def pinned(self, nbytes: int) -> torch.Tensor:
        self._log("pinned", nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def register(self, address: int, nbytes: int) -> bool:
        self._log("register", nbytes)
        if not self._register(address, nbytes):
            return False
        self.registered[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        self._log("unregister", self.registered.pop(address))

    def queue(self, stream: Stream, copy: Callable[[], None], nbytes: int) -> None:
        with self._lock:
            self._log("copy", nbytes)
            stream.queued.append(copy)

    def _reach(self, event: Event) -> None:
        with self._lock:
            stream = event.stream
            while stream.done < event.position:
                stream.queued[stream.done]()
                stream.queued[stream.done] = _nothing
                stream.done += 1

    def _log(self, what: str, detail: int = 0) -> None:
        with self._lock:
            self.calls.append(Call(what, threading.current_thread().name, detail))


class _Late(TorchDispatchMode):
    """Queues `copy_` in place of making it."""

    def __init__(self, streams: LateStreams, stream: Stream) -> None:
        super().__init__()
        self._streams, self._stream = streams, stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source = args[:2]
        self._streams.queue(self._stream, lambda: _copy(target, source), target.nbytes)
        return target


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _nothing() -> None:
    pass
