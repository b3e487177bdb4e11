"""Streams: how copies between the host and a device are ordered.

Owns the calls of `torch.cuda` that a copy beside other work needs: streams, events, pinned memory;
and copies from the host through pinned buffers (`Uploads`).
`Streams` is the host, where a copy is done when its call returns and nothing is waited for;
`CudaStreams` is a GPU. Code that copies is written once against this interface.

    current stream   step ──┐                    ┌── update        `wait_for_current`, then
    side stream             └── copy ── event ───┘                 `current_waits(event)`
    a thread                                 └── write             `synchronize(event)`
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class Streams:
    """The host. Every operation is in the order of its calls, so nothing here does anything."""

    is_device = False
    """Whether tensors are in memory that the host cannot read."""

    def enter_thread(self) -> None:
        """Make the device the current one of the calling thread. To be called first in each thread
        that uses it: a new thread begins with device 0, and would create a context there."""

    def new_stream(self) -> Any:
        """A stream beside the current one; usable from every thread."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """What the calling thread queues inside goes to `stream`."""
        return nullcontext()

    def wait_for_current(self, stream: Any) -> None:
        """What is queued on `stream` from now on waits for what the current stream of the calling
        thread has queued until now."""

    def record_event(self, stream: Any) -> Any:
        """An event that happens when `stream` has done what it has queued until now."""

    def current_waits(self, event: Any) -> None:
        """What the current stream of the calling thread queues from now on waits for `event`. The
        host does not wait."""

    def synchronize(self, event: Any) -> None:
        """The host waits for `event`. Raises what torch raises for an error on the device."""

    def pinned(self, nbytes: int) -> Tensor:
        """Host memory, uint8 [nbytes], that copies to and from the device need not stage."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def register(self, address: int, nbytes: int) -> bool:
        """Pin memory that is there, from a multiple of the page size on; whether it worked."""
        return False

    def unregister(self, address: int) -> None:
        """Undo `register`."""


class CudaStreams(Streams):
    """A GPU."""

    is_device = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def enter_thread(self) -> None:
        torch.cuda.set_device(self._device)

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self._device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def wait_for_current(self, stream: Any) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))

    def record_event(self, stream: Any) -> Any:
        return stream.record_event()

    def current_waits(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def register(self, address: int, nbytes: int) -> bool:
        # https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
        # A refusal stays the "last error" of the calling thread, and the next kernel that this
        # thread launches through torch would raise it: call this in a thread that launches none.
        return int(_runtime().cudaHostRegister(address, nbytes, 0)) == 0

    def unregister(self, address: int) -> None:
        _runtime().cudaHostUnregister(address)


HOST = Streams()


STREAMS: dict[str, Callable[[torch.device], Streams]] = {"cuda": CudaStreams}
"""Type of device to its streams; the host is every other one."""


def streams_for(device: torch.device) -> Streams:
    """The streams of this device."""
    make = STREAMS.get(device.type)
    return HOST if make is None else make(device)


class Upload:
    """Copies of one thread at a time to a device: a stream, and pinned buffers in turn.

    On the host there is one buffer, and a copy is done when `sending` ends.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._stream = streams.new_stream()
        streams.wait_for_current(self._stream)  # which may still write to the targets
        self._used: deque[tuple[Tensor, Any]] = deque()
        """Buffers, and the event after which each can be used again; the oldest first."""
        self._depth = 2 if streams.is_device else 1

    def buffer(self, nbytes: int, at_least: int = 0) -> Tensor:
        """Pinned memory, uint8 [nbytes], which nothing reads any more. A new one has `at_least` so
        many bytes, to be used again for more."""
        memory = None
        if len(self._used) == self._depth:
            memory, event = self._used.popleft()
            self._streams.synchronize(event)
        if memory is None or memory.numel() < nbytes:
            memory = self._streams.pinned(max(nbytes, at_least))
        self._taken = memory
        return memory[:nbytes]

    @contextmanager
    def sending(self) -> Iterator[None]:
        """What is queued inside may read the newest `buffer`."""
        with self._streams.use(self._stream):
            yield
        self._used.append((self._taken, self._streams.record_event(self._stream)))

    def finish(self) -> None:
        """Wait for what was queued."""
        self._streams.synchronize(self._streams.record_event(self._stream))


class Uploads:
    """The uploads of several threads to one device; all are done when its `with` block ends."""

    def __init__(self, streams: Streams, threads: int) -> None:
        self.streams = streams
        self._all = [Upload(streams) for _ in range(threads)]
        self._free: SimpleQueue[Upload] = SimpleQueue()
        for upload in self._all:
            self._free.put(upload)

    @contextmanager
    def one(self) -> Iterator[Upload]:
        """An upload for the calling thread."""
        self.streams.enter_thread()
        upload = self._free.get()
        try:
            yield upload
        finally:
            self._free.put(upload)

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for upload in self._all:
            upload.finish()


def _runtime() -> Any:
    return torch.cuda.cudart()
