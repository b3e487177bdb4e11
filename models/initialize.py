"""Filling the parameters of a model with their initial values, block by block, on several threads.

Owns where values are drawn and how they get to a device; `models.initial` owns the values. On the
host a float32 parameter is drawn in its place. For a device, a block is drawn and rounded in pinned
memory and copied beside the drawing of the next ones: the host never has more than two blocks a
thread. Invariant: the values are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launcher.layout.shard import Shard
from launcher.streams import Streams, streams_for
from launcher.weights.threads import in_parallel
from models.initial import Block, Constant, initial_blocks, narrowed
from models.spec import ModelSpec

BUFFERS = 2
"""Pinned buffers of a thread: one is filled while the other is copied."""


class Task(NamedTuple):
    """A block to fill in the shard of a parameter."""

    tensor: Tensor
    block: Block


@torch.no_grad()
def fill_initial(
    held: Mapping[str, Shard], spec: ModelSpec, seed: int, *, threads: int = 1
) -> None:
    """Fill every shard, on any device and in any floating dtype, with its initial values.

    `held`: name in files to the shard. Values that are drawn are float32, rounded to the dtype.
    """
    tasks = dict[torch.device, list[Task]]()
    for name, shard in held.items():
        for block in initial_blocks(name, shard.shape, shard.box, spec, seed):
            region = narrowed(shard.tensor, block.region)
            if isinstance(block, Constant):
                region.fill_(block.value)
            else:
                tasks.setdefault(region.device, []).append(Task(region, block))
    for device, some in tasks.items():
        with _Filler(streams_for(device), threads) as filler:
            if threads == 1:
                for task in some:
                    filler.fill(task)
            else:
                in_parallel(filler.fill, some, threads)


class _Workspace:
    """The stream of one thread, and its pinned buffers in turn."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.stream = streams.new_stream()
        streams.wait_for_current(self.stream)  # which may still write to the memory
        self._buffers: list[tuple[Tensor, Any]] = []
        """Pinned memory, and the event after which it can be used again; the oldest first."""

    def send(self, task: Task) -> None:
        """Draw a block and queue its copy to the device."""
        memory, dtype = self._buffer(task.tensor.nbytes), task.tensor.dtype
        staged = memory[: task.tensor.nbytes].view(dtype).view(task.tensor.shape)
        drawn = staged if dtype == torch.float32 else torch.empty(task.tensor.shape)
        task.block.draw(drawn)
        if drawn is not staged:
            staged.copy_(drawn)
        with self._streams.use(self.stream):
            task.tensor.copy_(staged, non_blocking=True)
            self._buffers.append((memory, self._streams.record_event(self.stream)))

    def finish(self) -> None:
        """Wait for what was queued."""
        self._streams.synchronize(self._streams.record_event(self.stream))

    def _buffer(self, nbytes: int) -> Tensor:
        if len(self._buffers) < BUFFERS:
            return self._streams.pinned(nbytes)
        memory, event = self._buffers.pop(0)
        self._streams.synchronize(event)
        return memory if memory.numel() >= nbytes else self._streams.pinned(nbytes)


class _Filler:
    """Fills blocks; used from several threads, and finished with its block of `with`."""

    def __init__(self, streams: Streams, threads: int) -> None:
        self._streams = streams
        self._workspaces: list[_Workspace] = []
        self._free: SimpleQueue[_Workspace] = SimpleQueue()
        for _ in range(threads if streams.is_device else 0):
            self._workspaces.append(_Workspace(streams))
            self._free.put(self._workspaces[-1])

    def __enter__(self) -> _Filler:
        return self

    def __exit__(self, *_: object) -> None:
        for workspace in self._workspaces:
            workspace.finish()

    @torch.no_grad()
    def fill(self, task: Task) -> None:
        """Fill one block."""
        if self._streams.is_device:
            self._streams.enter_thread()
            workspace = self._free.get()
            try:
                workspace.send(task)
            finally:
                self._free.put(workspace)
        elif task.tensor.dtype == torch.float32 and task.tensor.is_contiguous():
            task.block.draw(task.tensor)
        else:
            drawn = torch.empty(task.tensor.shape)
            task.block.draw(drawn)
            task.tensor.copy_(drawn)
