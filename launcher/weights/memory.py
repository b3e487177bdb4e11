"""The edge between tensors and bytes: shards, dtype names, views that share memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launcher.layout.box import Box, Shape

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
    """The memory of a contiguous CPU tensor as writable bytes; shares it, copies nothing."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("only a contiguous CPU tensor has bytes that can be shared")
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return memoryview(bytearray())
    return memoryview(flat.view(torch.uint8).numpy())


@dataclass(frozen=True)
class Shard:
    """A box of a global tensor and the local memory that holds it.

    `tensor` is contiguous and has the size of `box`; `shape` is the global shape.
    """

    shape: Shape
    box: Box
    tensor: torch.Tensor
