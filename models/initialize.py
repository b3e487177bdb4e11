"""Filling the parameters of a model with their initial values, block by block, on several threads.

Owns where values are drawn and how they get to a device; `models.initial` owns the values. On the
host a float32 parameter is drawn in its place. For a device, a block is drawn and rounded in pinned
memory and copied beside the drawing of the next ones: the host never has more than two blocks a
thread. Invariant: the values are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from launcher.layout.shard import Shard
from launcher.streams import Uploads, streams_for
from launcher.weights.threads import in_parallel
from models.initial import Block, Constant, initial_blocks, narrowed
from models.spec import ModelSpec


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
        largest = max(task.tensor.nbytes for task in some)
        with Uploads(streams_for(device), threads) as uploads:
            if threads == 1:
                for task in some:
                    _fill(task, uploads, largest)
            else:
                in_parallel(partial(_fill, uploads=uploads, largest=largest), some, threads)


@torch.no_grad()
def _fill(task: Task, uploads: Uploads, largest: int) -> None:
    """Fill one block; the largest has `largest` bytes. Gradient mode is one of each thread."""
    tensor, block = task
    if uploads.streams.is_device:
        _send(task, uploads, largest)
    elif tensor.dtype == torch.float32 and tensor.is_contiguous():
        block.draw(tensor)
    else:
        drawn = torch.empty(tensor.shape)
        block.draw(drawn)
        tensor.copy_(drawn)


def _send(task: Task, uploads: Uploads, largest: int) -> None:
    """Draw a block in pinned memory, rounded to the dtype of the tensor, and queue its copy."""
    tensor, block = task
    with uploads.one() as upload:
        staged = upload.buffer(tensor.nbytes, largest).view(tensor.dtype).view(tensor.shape)
        drawn = staged if tensor.dtype == torch.float32 else torch.empty(tensor.shape)
        block.draw(drawn)
        if drawn is not staged:
            staged.copy_(drawn)
        with upload.sending():
            tensor.copy_(staged, non_blocking=True)
