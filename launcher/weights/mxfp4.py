"""MXFP4 weights, as gpt-oss is published: which tensors hold them, which part a box needs.

Owns the format (https://arxiv.org/abs/2310.10537). Instead of a stack `x` [experts, in, out] the
files hold, transposed, `x_blocks` [experts, out, in / 32, 16], with two numbers in each byte, the
low half first, and `x_scales` [experts, out, in / 32], the exponent of each 32 numbers plus 127.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from launcher.layout.box import Box, Shape
from launcher.weights.pieces import Pieces

NUMBERS = 32
"""Numbers that share an exponent."""
BLOCKS, SCALES = "_blocks", "_scales"


class Packed(NamedTuple):
    """A tensor [n, in, out] that is stored as two others."""

    blocks: str
    scales: str
    shape: Shape
    """Of the tensor itself."""

    def blocks_for(self, box: Box) -> Box:
        """The part of `blocks` that `box` of the tensor needs."""
        (first, start, column), (count, length, columns) = box
        block, end = start // NUMBERS, -(-(start + length) // NUMBERS)
        return Box((first, column, block, 0), (count, columns, end - block, NUMBERS // 2))


def scales_for(blocks: Box) -> Box:
    """The part of `scales` that belongs to a box of `blocks`."""
    return Box(blocks.offset[:3], blocks.size[:3])


def tensor_of(blocks: Box) -> Box:
    """The box of the tensor in a box of `blocks`."""
    (first, column, block, _), (count, columns, number, _) = blocks
    return Box((first, block * NUMBERS, column), (count, number * NUMBERS, columns))


def packed_of(tensors: Mapping[str, Pieces]) -> dict[str, Packed]:
    """Name of every MXFP4 tensor to the tensors that hold it."""
    found = {}
    for blocks, pieces in tensors.items():
        name = blocks.removesuffix(BLOCKS)
        if name == blocks or name in tensors or name + SCALES not in tensors:
            continue
        held, exponents = pieces[0], tensors[name + SCALES][0]
        is_pair = held.shape == (*exponents.shape, NUMBERS // 2) and len(held.shape) == 4
        if is_pair and held.entry.dtype == exponents.entry.dtype == "U8":
            n, columns, number, _ = held.shape
            found[name] = Packed(blocks, name + SCALES, (n, number * NUMBERS, columns))
    return found
