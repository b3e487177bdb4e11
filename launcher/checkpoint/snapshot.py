"""Snapshots: a copy of the state in host memory, so that training continues while it is written.

Owns that copy: one buffer, reused by every snapshot. Its tensors have the order of the rank file,
so that large blocks are written without another copy. Tensors on a GPU are copied on a stream of
their own, into memory that was pinned when training began:

    current stream   step | forward, backward of the next one | waits | update
    side stream           └── copy ─────────────────────────────┘
    save thread               waits for the copy, then writes

Invariants: what is copied does not change before its copy is done (`SnapshotCopy.before_update`);
the tensors of a snapshot are valid until `take` is called again, which waits for a pending copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.background import Background
from launcher.checkpoint.host_memory import MOST_PINNED, HostBuffer, available_bytes
from launcher.checkpoint.space import size_text
from launcher.layout.shard import Shard
from launcher.streams import HOST, Streams
from launcher.weights.formats.safetensors import Slot, in_file_order
from launcher.weights.reading.tensor_bytes import DTYPE_NAMES


class SnapshotCopy:
    """The copy of one snapshot: it may still be on its way."""

    def __init__(
        self, shards: dict[str, Shard], streams: Streams, event: Any, sources: list[Tensor]
    ) -> None:
        self.shards = shards
        """In host memory; their values are there after `finish`."""
        self._streams, self._event = streams, event
        # Held until they are copied: the memory of a temporary tensor would be given to the next
        # one of the current stream, which does not wait for the copy.
        self._sources = sources

    def before_update(self) -> None:
        """Let the device finish the copy before what the current stream gets from now on. To be
        called before the tensors change; the host does not wait."""
        self._streams.current_waits(self._event)

    def finish(self) -> None:
        """Wait until the values are there. Can be called from any thread, and more than once.

        Raises what torch raises for an error on the device.
        """
        if self._sources:
            self._streams.enter_thread()
            self._streams.synchronize(self._event)
            self._sources = []


class Snapshot:
    """Host memory for the tensors of one rank's state."""

    def __init__(self, streams: Streams = HOST) -> None:
        self._streams = streams
        self._buffer: HostBuffer | None = None
        self._stream: Any = None
        self._pinning: Background[None] = Background("pin")
        self._pending: SnapshotCopy | None = None
        self._may_pin = True

    @property
    def nbytes(self) -> int:
        """Size of the buffer."""
        return 0 if self._buffer is None else self._buffer.memory.numel()

    def prepare(self, nbytes: int, nbytes_on_host: int) -> str:
        """Allocate and pin the buffer in the background, if tensors are on a device. Returns one
        line about it for the log, empty on the host.

        `nbytes_on_host`: of all ranks of this machine together.
        """
        if not self._streams.is_device or self.nbytes >= nbytes or self._pinning.is_busy:
            return ""
        needed = f"{size_text(nbytes_on_host)} of host memory"
        free = available_bytes()
        if free is not None and nbytes_on_host > MOST_PINNED * free:
            self._may_pin = False
            return (
                f"warning: async_save: {needed} are needed on this machine and {size_text(free)} "
                "are free: not pinned, training waits longer for a save"
            )
        self._pinning.start(lambda: self._allocate(nbytes, pinned=True))
        return f"async_save: {needed} are pinned in the background"

    def take(self, held: Mapping[str, Shard], early: Collection[str] = ()) -> SnapshotCopy:
        """Start a copy of the current values of `held`.

        `early`: names of those that may change before the next update of the optimizer, such as
        buffers. They are copied first, and the current stream waits for them at once.
        """
        self.finish()
        early = [name for name in held if name in early]
        tensors = {name: shard.tensor.detach() for name, shard in held.items()}
        order = in_file_order(
            Slot(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in tensors.items()
        )
        self._reserve(sum(slot.nbytes for slot in order))
        places, start = dict[str, tuple[int, int]](), 0
        for slot in order:
            places[slot.name] = start, start + slot.nbytes
            start += slot.nbytes
        streams = self._streams
        if self._stream is None:
            self._stream = streams.new_stream()
        streams.wait_for_current(self._stream)
        sources = [*tensors.values()]
        try:
            with streams.use(self._stream):
                for name in early:
                    sources += self._copy(tensors[name], *places[name])
                early_event = streams.record_event(self._stream) if early else None
                for name in (name for name in places if name not in early):
                    sources += self._copy(tensors[name], *places[name])
                event = streams.record_event(self._stream)
        except BaseException:  # the buffer and the sources are not in use when this returns
            streams.synchronize(streams.record_event(self._stream))
            raise
        if early:
            streams.current_waits(early_event)
        shards = {name: held[name]._replace(tensor=self._view(tensors[name], *places[name]))
                  for name in places}  # fmt: skip
        self._pending = SnapshotCopy(shards, streams, event, sources)
        return self._pending

    def finish(self) -> None:
        """Wait for the copy that is pending, if one is."""
        if self._pending is not None:
            self._pending.finish()
            self._pending = None

    def _copy(self, tensor: Tensor, start: int, stop: int) -> list[Tensor]:
        """Queue the copy of one tensor. Returns the tensors that it makes on the way."""
        assert self._buffer is not None
        pieces = list(self._buffer.pieces(start, stop))
        if len(pieces) == 1:
            self._view(tensor, start, stop).copy_(tensor, non_blocking=True)
            return []
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        for first, last in pieces:
            part = flat[first - start : last - start]
            self._buffer.memory[first:last].copy_(part, non_blocking=True)
        return [flat]

    def _view(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        assert self._buffer is not None
        return self._buffer.memory[start:stop].view(tensor.dtype).view(tensor.shape)

    def _reserve(self, nbytes: int) -> None:
        """Have a buffer of `nbytes`: that of `prepare`, or a new one."""
        if self._pinning.is_busy:
            with suppress(MemoryError, RuntimeError):  # tried again, and raised, below
                self._pinning.finish()
        if self._buffer is None or self.nbytes < nbytes:
            self._buffer = None  # free the smaller one first
            self._pinning.start(lambda: self._allocate(nbytes, pinned=self._may_pin))
            self._pinning.finish()

    def _allocate(self, nbytes: int, *, pinned: bool) -> None:
        buffer = HostBuffer(nbytes, self._streams)
        if pinned and self._streams.is_device:
            buffer.pin()
        self._buffer = buffer
