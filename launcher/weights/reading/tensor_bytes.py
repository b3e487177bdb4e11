"""Tensors as bytes: dtype names, and arrays that share the memory of tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from launcher.weights.reading.pages import make_huge, use_huge_pages
from launcher.weights.reading.transfer import Bytes

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Dtype names of the safetensors format to torch dtypes."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes, shared, not copied."""
    if not tensor.is_contiguous():
        raise ValueError("only a contiguous CPU tensor has bytes that can be shared")
    return memory_of(tensor)[0].data


def memory_of(tensor: torch.Tensor) -> tuple[Bytes, list[int]]:
    """The memory of a CPU tensor from its first element to its last, shared, and the stride of each
    dim in bytes."""
    storage, (start, strides) = _storage_bytes(tensor), address_of(tensor)
    if tensor.numel() == 0:
        return np.empty(0, np.uint8), strides
    item = tensor.element_size()
    span = item + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    return storage[start : start + span], strides


def address_of(tensor: torch.Tensor) -> tuple[int, list[int]]:
    """(offset of the first element in the storage, stride of each dim), in bytes."""
    item = tensor.element_size()
    return int(tensor.storage_offset()) * item, [stride * item for stride in tensor.stride()]


def _storage_bytes(tensor: torch.Tensor) -> Bytes:
    if tensor.device.type != "cpu":
        raise ValueError("only a CPU tensor has bytes that can be shared")
    storage = tensor.detach().untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    array: Bytes = flat.numpy()
    return array


class Storages:
    """The storages of CPU tensors that are about to be written, as byte arrays, one for each: the
    tensors of a stack of experts share a storage."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
        self._blocks = use_huge_pages({(s.data_ptr(), s.nbytes()) for s in storages})
        self._known: dict[tuple[int, int], Bytes] = {}

    def under(self, tensor: torch.Tensor) -> Bytes:
        """The storage of `tensor`, on huge pages where possible; `address_of` gives the offset in
        it."""
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), storage.nbytes())  # several storages may have one address
        if place not in self._known:
            make_huge(self._blocks, *place)
            self._known[place] = _storage_bytes(tensor)
        return self._known[place]
