"""Shards: the part of a global tensor that one rank holds, with its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from launcher.layout.box import Box, Shape

if TYPE_CHECKING:
    import torch


class Shard(NamedTuple):
    """A box of a global tensor and the local memory that holds it.

    `tensor` has the size of `box`; `shape` is the global shape.
    """

    shape: Shape
    box: Box
    tensor: torch.Tensor
