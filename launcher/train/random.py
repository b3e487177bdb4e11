"""Random numbers of a step: functions of (seed, step, sample), without a generator state.

So they are the same after a resume and on any number of ranks. The model (`models.decoder`) mixes
in the layer.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 63-bit number that depends on all `values` (the finalizer of SplitMix64, chained).

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def sample_seeds(seed: int, step: int, sample_ids: torch.Tensor) -> torch.Tensor:
    """One seed for each sample of a micro-batch: int64 [batch] of int64 [batch]."""
    return torch.tensor([mix(seed, step, sample) for sample in sample_ids.tolist()])
