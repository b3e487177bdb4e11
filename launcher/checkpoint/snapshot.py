"""Snapshots: a copy of a state in host memory, so that training goes on while it is written.

Owns that memory: one piece, made at the first snapshot and used again for every other (pinned where
tensors come from a GPU, whose copies then run at the speed of the bus). Invariant: what `take` gave
before is no longer valid once it is called again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from launcher.weights.reading.memory import Shard, use_huge_pages

ALIGNMENT = 64
"""Bytes at whose multiples tensors begin, as allocators have it."""


class Snapshot:
    """Host memory for the tensors of one rank's state."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of the memory that is held."""
        return self._memory.numel()

    def take(self, held: Mapping[str, Shard]) -> dict[str, Shard]:
        """The same shards with their values of now, in host memory."""
        tensors = {name: shard.tensor.detach() for name, shard in held.items()}
        starts, size = dict[str, int](), 0
        for name, tensor in tensors.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors.values())
        if self._memory.numel() < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # let go of the smaller one first
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            use_huge_pages(self._memory)
        taken = {}
        for name, tensor in tensors.items():
            raw = self._memory[starts[name] : starts[name] + tensor.nbytes]
            copy = raw.view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor, non_blocking=True)
            taken[name] = replace(held[name], tensor=copy)
        if on_gpu:
            torch.cuda.synchronize()
        return taken
