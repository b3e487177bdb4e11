"""Bytes of tensors on a device, for the threads that write them: block by block, in pinned memory.

Each writer copies the pieces of its block on a stream of its own, one after another into one
buffer, and waits once: while it does, the others hash and write theirs. The buffer begins at a
page, so that its block goes to the disk without another copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from launcher.streams import Streams
from launcher.weights.reading.tensor_bytes import bytes_of
from launcher.weights.streaming.write import Staging


class _Workspace(NamedTuple):
    stream: Any
    memory: torch.Tensor
    """Pinned, uint8."""


class DeviceBlocks(Staging):
    """The staging of tensors on a device. Made by the thread whose current stream has written
    them."""

    def __init__(self, streams: Streams, writers: int, block_bytes: int) -> None:
        self._streams = streams
        self._own = threading.local()
        self._free: SimpleQueue[_Workspace] = SimpleQueue()
        for _ in range(writers):
            stream = streams.new_stream()
            streams.wait_for_current(stream)
            self._free.put(_Workspace(stream, streams.pinned(block_bytes)))

    @contextmanager
    def block(self) -> Iterator[None]:
        """What the calling thread reads inside is valid until its end."""
        self._streams.enter_thread()
        self._own.workspace, self._own.filled = self._free.get(), 0
        try:
            yield
        finally:
            self.arrived()  # after an error too: nothing is copied into a buffer that is free
            self._free.put(self._own.workspace)

    def read(self, tensor: torch.Tensor, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a contiguous tensor, which are there after `arrived`."""
        flat = tensor.reshape(-1).view(torch.uint8)[start:stop]
        workspace, first = self._own.workspace, self._own.filled
        memory = workspace.memory[first : first + flat.numel()]
        if memory.numel() < flat.numel():  # a part that is read twice
            return bytes_of(flat.cpu())
        self._own.filled += flat.numel()
        with self._streams.use(workspace.stream):
            memory.copy_(flat, non_blocking=True)
        return bytes_of(memory)

    def arrived(self) -> None:
        """Wait for what the calling thread has read."""
        stream = self._own.workspace.stream
        self._streams.synchronize(self._streams.record_event(stream))
