"""Unpacking MXFP4 numbers (`launcher.weights.mxfp4` owns the format)."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = (*_HALF, *(-number for number in _HALF))
_BIAS = 127


def unpack(blocks: Tensor, exponents: Tensor) -> Tensor:
    """[..., n, 16] and [..., n], both uint8 on one device -> [..., n * 32] float32, exact.

    Numbers and powers of two are looked up: `pow` is not exact on every device.
    """
    numbers = torch.tensor(_NUMBERS).to(blocks.device)
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - _BIAS).to(blocks.device)
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    scales = powers[exponents.long()][..., None]
    return numbers[nibbles.long()].mul_(scales).flatten(-2)
