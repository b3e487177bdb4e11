"""Unpacking MXFP4 numbers (`launcher.weights.mxfp4` owns the format)."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor((*_HALF, *(-number for number in _HALF)))
_BIAS = 127
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - _BIAS)


def unpack(blocks: Tensor, exponents: Tensor) -> Tensor:
    """[..., n, 16] and [..., n], both uint8 on one device -> [..., n * 32] float32, exact.

    Numbers and powers of two are looked up: `pow` is not exact on every device.
    """
    numbers, powers = (table.to(blocks.device, non_blocking=True) for table in (_NUMBERS, _POWERS))
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    scales = powers[exponents.long()][..., None]
    return numbers[nibbles.long()].mul_(scales).flatten(-2)
