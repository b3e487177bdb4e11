"""The blend of a mixture: from which source each sample is, by exact shares.

Owns the pattern of sources and where the samples of a source are in it. Invariants:

1. Shares are fractions p_i / q with integer p_i, and everything is computed in integers.
2. Of any number of samples from the start, every source has less than one sample more or less than
   its share. (The source with the largest deficit at each sample would not do: from four sources on
   one can fall behind by more.)
3. The pattern has period q, and is a function of the p_i alone.

The rule is that of Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980):
among m sources, sample g goes to one whose deficit p_i * (g + 1) / q - taken_i is at least
1 / (2 m - 2), and of those to the one that must have it earliest to keep its deficit below
1 - 1 / (2 m - 2). That is scheduling by earliest deadline: the k-th sample of source i may be one
of the numbers

    first(i, k) = ceil(q * (k + 1 / D) / p_i) - 1          D = 2 m - 2
    last(i, k)  = floor(q * (k + 1 - 1 / D) / p_i)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

LARGEST_PERIOD = 1 << 17
"""Shares whose common denominator is larger are rounded to this one."""

Ints = npt.NDArray[np.int64]


def integer_weights(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest integers in the proportion of `shares`, which are above zero.

    Where their sum would be larger than LARGEST_PERIOD they are rounded to that sum, by largest
    remainder (Hamilton's method); none to less than one.
    """
    if not shares or min(shares) <= 0:
        raise ValueError(f"shares are above zero, not {[str(share) for share in shares]}")
    common = lcm(*(share.denominator for share in shares))
    weights = [int(share * common) for share in shares]
    divisor = gcd(*weights)
    weights = [weight // divisor for weight in weights]
    return tuple(weights if sum(weights) <= LARGEST_PERIOD else _rounded(weights))


def _rounded(weights: Sequence[int]) -> list[int]:
    total = sum(weights)
    if len(weights) > LARGEST_PERIOD:
        raise ValueError(f"{len(weights)} sources, more than {LARGEST_PERIOD}")
    parts = [divmod(weight * LARGEST_PERIOD, total) for weight in weights]
    rounded = [max(units, 1) for units, _ in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (-parts[i][1], i))
    for index in by_remainder[: max(LARGEST_PERIOD - sum(rounded), 0)]:
        rounded[index] += parts[index][0] > 0  # those raised to one have more than their share
    while (excess := sum(rounded) - LARGEST_PERIOD) > 0:
        largest = max(range(len(rounded)), key=rounded.__getitem__)
        rounded[largest] -= min(excess, rounded[largest] - 1)
    divisor = gcd(*rounded)
    return [weight // divisor for weight in rounded]


@dataclass(frozen=True)
class Blend:
    """The source of every sample, for sources with these weights."""

    weights: tuple[int, ...]
    pattern: Ints
    """[period]: the source of each sample of a period."""
    numbers: Ints
    """[period]: how many earlier samples of the period are of the same source."""
    places: tuple[Ints, ...]
    """For each source its samples in the period, ascending."""

    @property
    def period(self) -> int:
        """Samples after which the pattern repeats: the sum of the weights."""
        return len(self.pattern)

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """For samples (from 0, any shape, int64): the source of each, and how many samples of that
        source are before it."""
        periods, places = np.divmod(samples, self.period)
        sources = self.pattern[places]
        return sources, periods * np.array(self.weights)[sources] + self.numbers[places]

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each source."""
        periods, rest = divmod(samples, self.period)
        return [
            periods * weight + int(np.searchsorted(places, rest))
            for weight, places in zip(self.weights, self.places, strict=True)
        ]


@lru_cache(maxsize=8)
def blend(weights: tuple[int, ...]) -> Blend:
    """The blend of sources with these integer weights, each at least 1."""
    pattern = _pattern(weights)
    places = tuple(np.flatnonzero(pattern == source) for source in range(len(weights)))
    numbers = np.empty_like(pattern)
    for own in places:
        numbers[own] = np.arange(len(own))
    return Blend(weights, pattern, numbers, places)


def _pattern(weights: tuple[int, ...]) -> Ints:
    """One period: every sample to the source with the earliest deadline among those it may be of.

    A schedule without a missed deadline exists (Tijdeman), and this rule finds one where there is
    one; it fills the period, because the last deadline is its last sample.
    """
    period = sum(weights)
    if len(weights) == 1:
        return np.zeros(period, dtype=np.int64)
    windows = sorted(
        window for source, weight in enumerate(weights)
        for window in _windows(source, weight, period, 2 * len(weights) - 2)
    )  # fmt: skip
    pattern = np.empty(period, dtype=np.int64)
    ready: list[tuple[int, int]] = []
    arrived = 0
    for sample in range(period):
        while arrived < period and windows[arrived][0] <= sample:
            heapq.heappush(ready, windows[arrived][1:])
            arrived += 1
        deadline, pattern[sample] = heapq.heappop(ready)
        assert sample <= deadline
    return pattern


def _windows(source: int, weight: int, period: int, slack: int) -> list[tuple[int, int, int]]:
    """(first, last, source) of each sample of a source; `slack` is D above."""
    divisor = weight * slack
    return [
        (
            -(-period * (k * slack + 1) // divisor) - 1,
            period * (k * slack + slack - 1) // divisor,
            source,
        )
        for k in range(weight)
    ]
