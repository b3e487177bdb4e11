"""Grouped matrix products: rows sorted by group, each multiplied by the matrix of its group.

Owns which kernel computes them, and what the host has to know for it. Invariants: where a kernel
takes the ends of the groups from the device, the host does not wait; elsewhere it reads the sizes
of the groups once for all products over them. The gradient of a matrix whose group is empty is
zero.

`F.grouped_mm` runs one kernel for all groups on CUDA for bfloat16 on compute capability 9 and 10
(the rule of `_grouped_mm_cuda` in ATen's GroupedBlas.cpp). For other dtypes and devices it reads
the ends of the groups itself, in every product, forward and backward; the loop here reads them
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.host_reads import host_read
from models.products import infers, linear

_CAPABILITIES_WITH_KERNEL = (9, 10)
_WRONG_GRADIENTS_OF_EMPTY_GROUPS = (10,)
"""Capabilities on which the kernel leaves garbage in the gradient of a matrix whose group is empty
(pytorch/pytorch#172439, seen with torch 2.9 to 2.13)."""


class Groups:
    """The division of sorted rows into groups, shared by all products over these rows."""

    def __init__(self, counts: Tensor, sizes: Sequence[int] | None = None) -> None:
        """`counts` [groups] int64: rows of each group; `sizes`: the same, where the host knows
        them already."""
        self.counts = counts
        self._sizes = sizes
        self._ends: Tensor | None = None

    @property
    def ends(self) -> Tensor:
        """The index behind the last row of each group [groups], int32."""
        if self._ends is None:
            self._ends = self.counts.cumsum(0, dtype=torch.int32)
        return self._ends

    @property
    def sizes(self) -> Sequence[int]:
        """`counts` on the host, which waits for them in the first use."""
        if self._sizes is None:
            with host_read("group sizes"):
                self._sizes = self.counts.tolist()
        return self._sizes


def grouped_linear(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """`rows` [n, inputs], sorted by group, times `weight` [groups, outputs, inputs]: [n, outputs].
    All have one dtype."""
    if infers() and weight.device.type == "cpu":
        return _each_group(rows, weight, groups)
    if not has_kernel(weight):
        return _in_a_loop(rows, weight, groups.sizes)
    if weight.is_cuda:
        if len(rows) == 0:
            return _in_a_loop(rows, weight, [0] * len(weight))
        if _capability(weight.device) in _WRONG_GRADIENTS_OF_EMPTY_GROUPS:
            weight = _ZeroGradientOfEmpty.apply(weight, groups.counts)
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=groups.ends)


def has_kernel(weight: Tensor) -> bool:
    """Whether products with `weight` [groups, outputs, inputs] run without group sizes on the
    host. (On the CPU, where reading them is free, it means that torch loops itself.)"""
    return has_kernel_for(weight.shape[1:], weight.dtype, weight.device)


def has_kernel_for(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    """As `has_kernel`, for matrices of these sizes."""
    if any(size * dtype.itemsize % 16 for size in sizes):
        return False  # rows must begin at multiples of 16 bytes
    is_bf16 = dtype == torch.bfloat16
    if device.type == "cuda":
        return is_bf16 and _capability(device) in _CAPABILITIES_WITH_KERNEL
    return is_bf16 or not torch.compiler.is_compiling()  # traced for bfloat16 only


@cache
def _capability(device: torch.device) -> int:
    """The major compute capability; without a device, as in a dry run, that of Hopper."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 9


def _in_a_loop(rows: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    parts = zip(rows.split(list(sizes)), weight.unbind(), strict=True)
    return torch.cat([F.linear(part, matrix) for part, matrix in parts])


def _each_group(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """As `grouped_linear`, group by group: in a decoding step few groups have a row, and the
    weights of the others are not read."""
    parts = zip(rows.split(list(groups.sizes)), weight.unbind(), strict=True)
    products = [linear(part, matrix) for part, matrix in parts if len(part)]
    return torch.cat(products) if products else rows.new_empty(0, weight.shape[1])


class _ZeroGradientOfEmpty(torch.autograd.Function):
    """`weight` unchanged, with a gradient of zero for groups without rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return gradient.masked_fill((counts == 0)[:, None, None], 0), None


def of_group(values: Tensor, groups: Groups, length: int) -> Tensor:
    """The row [length, size] of `values` [groups, size] of the group of each of `length` rows."""
    index = torch.arange(length, device=groups.counts.device)
    group = torch.searchsorted(groups.counts.cumsum(0), index, right=True)
    return F.embedding(group, values)  # whose backward pass sums in a fixed order
