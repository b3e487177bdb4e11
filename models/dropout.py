"""Dropout with one seed a sample.

Invariant: the dropout mask is a function of (seed of the sample, index in the sample) alone. It
does not depend on the batch, sharding, rank or device; no generator is used, so recomputing a layer
gives the same mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Dropout sites of a layer: attention probabilities, outputs of attention and of the MLP, inputs of
# adapters (each module is then a site within that one).
ATTENTION_PROBABILITIES, ATTENTION_OUTPUT, MLP_OUTPUT, ADAPTER = 0, 1, 2, 3


def dropout(
    states: Tensor,
    probability: float,
    seeds: Tensor,
    *,
    lines: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`states` [rows, ..., width] with elements zeroed with `probability` and the others scaled.

    `seeds` [rows]: 32-bit integers in int64. The mask of row i is a function of `seeds[i]` and the
    line and column index of an element. `lines` [...] and `columns` [width] are the global indices,
    from 0, of a shard; by default 0, 1, 2 and so on.
    """
    rows, width, device = states.shape[0], states.shape[-1], states.device
    if lines is None:
        lines = torch.arange(states[0].numel() // width, device=device)
    if columns is None:
        columns = torch.arange(width, device=device)
    line_keys = mix(seeds[:, None] ^ mix(lines.flatten() + 1))
    bits = mix(line_keys[:, :, None] ^ mix(columns + (1 << 24) + 1))
    kept = bits.view(rows, *states.shape[1:]) >= int(probability * 2**32)
    return states * kept * (1.0 / (1.0 - probability))


def dropout_seeds(sample_seeds: Tensor, layer: int | Tensor, site: int) -> Tensor:
    """One 32-bit seed a sample for one site of one layer. `sample_seeds` [rows]: any int64.

    `layer`: its number, an integer or an int64 scalar on the same device."""
    low, high = sample_seeds & 0xFFFFFFFF, (sample_seeds >> 32) & 0xFFFFFFFF
    salt = (layer * 4 + site + 1) * 0x9E3779B1 & 0xFFFFFFFF
    return mix(mix(mix(low) ^ high) ^ salt)


def mix(numbers: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers in int64: shift and multiply, twice. No product overflows
    int64."""
    mixed = numbers ^ (numbers >> 15)
    mixed = (mixed * 0x2C1B3C6D).bitwise_and_(0xFFFFFFFF)
    mixed ^= mixed >> 12
    mixed = mixed.mul_(0x297A2D39).bitwise_and_(0xFFFFFFFF)
    mixed ^= mixed >> 15
    return mixed
