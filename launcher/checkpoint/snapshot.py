"""Snapshots: a copy of the state in host memory, so that training continues while it is written.

Owns that memory: one buffer, allocated at the first snapshot and reused. Its tensors have the order
of the rank file, so that large blocks are written without another copy. For tensors on a GPU it is
page-locked, so that copies run at full speed. Invariant: the tensors of a snapshot are valid until
`take` is called again.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from launcher.layout.shard import Shard
from launcher.weights.formats.safetensors import Slot, in_file_order
from launcher.weights.reading.pages import use_huge_pages
from launcher.weights.reading.tensor_bytes import DTYPE_NAMES


class Snapshot:
    """Host memory for the tensors of one rank's state."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._is_locked = False

    def __del__(self) -> None:
        with suppress(Exception):  # CUDA may be shut down at the end of the process
            self._unlock()

    @property
    def nbytes(self) -> int:
        """Size of the buffer."""
        return self._memory.numel()

    def take(self, held: Mapping[str, Shard]) -> dict[str, Shard]:
        """The same shards with their current values, in host memory."""
        tensors = {name: shard.tensor.detach() for name, shard in held.items()}
        order = in_file_order(
            Slot(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in tensors.items()
        )
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors.values())
        self._allocate(sum(slot.nbytes for slot in order), locked=on_gpu)
        taken, start = dict[str, Shard](), 0
        for slot in order:
            tensor = tensors[slot.name]
            raw = self._memory[start : start + slot.nbytes]
            copy = raw.view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor, non_blocking=True)
            taken[slot.name] = held[slot.name]._replace(tensor=copy)
            start += slot.nbytes
        if on_gpu:
            torch.cuda.synchronize()
        return taken

    def _allocate(self, nbytes: int, *, locked: bool) -> None:
        if self._memory.numel() >= nbytes:
            return
        self._unlock()
        self._memory = torch.empty(0, dtype=torch.uint8)  # free the smaller one first
        memory = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8)
        use_huge_pages([(memory.data_ptr(), memory.numel())])
        start = -memory.data_ptr() % mmap.PAGESIZE
        self._memory = memory[start : start + nbytes]
        if locked:
            # Not `pin_memory=True`: that rounds up to a power of two, twice the memory at worst.
            # https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
            error = _cuda_runtime().cudaHostRegister(self._memory.data_ptr(), nbytes, 0)
            self._is_locked = int(error) == 0  # else copies are only slower

    def _unlock(self) -> None:
        if self._is_locked:
            _cuda_runtime().cudaHostUnregister(self._memory.data_ptr())
            self._is_locked = False


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()
