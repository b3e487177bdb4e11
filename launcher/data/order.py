"""The global order: which row of the dataset is the n-th sample of a run.

Owns one pure function, (size, seed, sample number) to row. Invariants:

1. An epoch visits every row exactly once: its order is a permutation.
2. There is no state and no random generator: any position of any epoch is computed in O(1).
3. The formula below never changes, because a resumed run depends on it (tests have golden values).

The formula, in unsigned 64-bit arithmetic with wrap-around. `mix` is the finaliser of SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014):

    mix(x):  x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;
             x ^= x >> 27;  x *= 0x94D049BB133111EB;  x ^= x >> 31
    key(round) = mix(mix(mix(seed + G) + epoch + G) + (round + 1) * G)
    G = 0x9E3779B97F4A7C15

A position x of an epoch is written as x = right * a + left, with a = ceil(sqrt(size)) and
b = ceil(size / a). Eight rounds of a generalised Feistel network (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002) follow, each of which is invertible for any `mix`:

    even rounds:  left  = (left  + mix(right ^ key(round)) mod a) mod a
    odd rounds:   right = (right + mix(left  ^ key(round)) mod b) mod b

The result lies in [0, a * b), of which fewer than `a` values are not rows. The network is applied
to those again until they are (cycle walking), so that the map is a permutation of [0, size).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt

ROUNDS = 8
LARGEST_SIZE = 2**62
_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15

Words = npt.NDArray[np.uint64]


class Order(Protocol):
    """Which row each sample of a run is: a pure function."""

    @property
    def size(self) -> int:
        """Rows of the dataset."""

    @property
    def seed(self) -> int: ...

    def rows(self, global_samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The rows of many global samples (any shape, any order): int64 of the same shape."""


@dataclass(frozen=True)
class GlobalOrder:
    """The order of the samples of a run, epoch after epoch without a gap.

    Global sample g is in epoch g // size (from 0) and is row permutation(seed, epoch)[g % size].
    Without `shuffle` every epoch visits the rows in order.
    """

    size: int
    """Rows of the dataset."""
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST_SIZE:
            raise ValueError(f"an order needs between 1 and 2**62 rows, not {self.size}")

    def row(self, global_sample: int) -> int:
        """The row of one global sample (from 0)."""
        return int(self.rows(np.array([global_sample], dtype=np.int64))[0])

    def rows(self, global_samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The rows of many global samples (any shape, any order): int64 of the same shape."""
        samples = np.asarray(global_samples, dtype=np.int64)
        if samples.size and int(samples.min()) < 0:
            raise ValueError(f"global samples count from 0, got {int(samples.min())}")
        epochs, positions = np.divmod(samples, self.size)
        if not self.shuffle:
            return positions
        return _permute(positions.ravel(), epochs.ravel(), self.size, self.seed).reshape(
            samples.shape
        )


def _permute(
    positions: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64], size: int, seed: int
) -> npt.NDArray[np.int64]:
    keys = _epoch_keys(epochs.astype(np.uint64), seed)
    rows = _network(positions.astype(np.uint64), keys, size)
    outside = np.flatnonzero(rows >= size)
    while outside.size:
        rows[outside] = _network(rows[outside], keys[outside], size)
        outside = outside[rows[outside] >= size]
    return rows.astype(np.int64)


def _network(positions: Words, keys: Words, size: int) -> Words:
    """One pass of the network over [0, a * b); `keys` has the key of each element's epoch."""
    a = np.uint64(isqrt(size - 1) + 1 if size > 1 else 1)
    b = np.uint64(-(-size // int(a)))
    right, left = np.divmod(positions, a)
    for number in range(ROUNDS):
        round_keys = _mix(keys + np.uint64((number + 1) * _GOLDEN % _WORD))
        if number % 2 == 0:
            left = (left + _mix(right ^ round_keys) % a) % a
        else:
            right = (right + _mix(left ^ round_keys) % b) % b
    return right * a + left


def _epoch_keys(epochs: Words, seed: int) -> Words:
    seed_key = _mix(np.array([(seed + _GOLDEN) % _WORD], dtype=np.uint64))
    return _mix(seed_key + epochs + np.uint64(_GOLDEN))


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
