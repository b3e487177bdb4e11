"""Dropout that belongs to a sample.

Invariant: what is dropped is a function of (seed of the sample, place in the sample) alone. Rows
may share a batch or not, and be cut by heads or by tokens, on any rank and device; nothing is drawn
from a generator, so recomputing a layer gives the same pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Places of dropout in a layer: the attention shares, what attention adds, what the MLP adds.
SHARES, ATTENTION_OUTPUT, MLP_OUTPUT = 0, 1, 2


def dropout(
    states: Tensor,
    probability: float,
    seeds: Tensor,
    *,
    lines: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`states` [rows, ..., width] with a share of `probability` zeroed and the others scaled up.

    `seeds` [rows]: 32-bit numbers in int64. The pattern in row i is a function of `seeds[i]` and
    the numbers of an element's line and column. `lines` [...] numbers the lines of a row and
    `columns` [width] the columns, from 0, for a piece of something larger; both are counted through
    by default.
    """
    rows, width, device = states.shape[0], states.shape[-1], states.device
    if lines is None:
        lines = torch.arange(states[0].numel() // width, device=device)
    if columns is None:
        columns = torch.arange(width, device=device)
    line_keys = _mix(seeds[:, None] ^ _mix(lines.flatten() + 1))
    bits = _mix(line_keys[:, :, None] ^ _mix(columns + (1 << 24) + 1))
    kept = bits.view(rows, *states.shape[1:]) >= int(probability * 2**32)
    return states * kept * (1.0 / (1.0 - probability))


def dropout_seeds(sample_seeds: Tensor, layer: int, site: int) -> Tensor:
    """One 32-bit seed a sample for one place of one layer. `sample_seeds` [rows] int64, any."""
    low, high = sample_seeds & 0xFFFFFFFF, (sample_seeds >> 32) & 0xFFFFFFFF
    place = (layer * 4 + site + 1) * 0x9E3779B1 & 0xFFFFFFFF
    return _mix(_mix(_mix(low) ^ high) ^ place)


def _mix(numbers: Tensor) -> Tensor:
    """A bijective mixer of 32-bit numbers held in int64: shift, multiply, twice. No product
    overflows int64."""
    mixed = numbers ^ (numbers >> 15)
    mixed = (mixed * 0x2C1B3C6D).bitwise_and_(0xFFFFFFFF)
    mixed ^= mixed >> 12
    mixed = mixed.mul_(0x297A2D39).bitwise_and_(0xFFFFFFFF)
    mixed ^= mixed >> 15
    return mixed
