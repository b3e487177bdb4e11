"""Mixtures: which row of which source is the n-th sample of a run.

Owns one pure function, (sources, weights, seeds, sample number) to (source, row), and the shares of
the sources. Invariants:

1. Of any number of samples since the weights were set, every source has less than one sample more
   or less than its share (`launcher.data.blend`).
2. The k-th sample that a run takes from a source is the k-th of its `GlobalOrder`, whatever the
   weights: all of its rows are visited before one is repeated.
3. There is no state: any position is computed in a time that does not depend on it.

Weights that change in a run begin a `Segment`: the blend starts again, and every source continues
after the samples that were taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from launcher.data.blend import Blend, Ints, blend, integer_weights
from launcher.data.order import GlobalOrder


class SourceOrder(NamedTuple):
    """A source of a mixture, and the order of its rows."""

    name: str
    rows: int
    content: str
    """Hash of its rows."""
    seed: int
    shuffle: bool
    settings: Mapping[str, Any] = {}
    """Settings that decide its rows beside `content`, as JSON values."""


class Segment(NamedTuple):
    """The part of a run from one change of the mixture to the next."""

    from_sample: int
    weights: dict[str, int]
    """Name of a source to its weight."""
    taken: dict[str, int]
    """Samples taken from each source before; also of sources that have left the mixture."""

    @property
    def blend(self) -> Blend:
        """The blend of its sources, in the order of their names."""
        return blend(tuple(weight for _, weight in sorted(self.weights.items())))

    def taken_before(self, position: int) -> dict[str, int]:
        """Samples taken from each source before the global sample `position`. Raises ValueError for
        one before the segment."""
        if position < self.from_sample:
            raise ValueError(f"sample {position} is before sample {self.from_sample}")
        counts = self.blend.taken(position - self.from_sample)
        names = sorted(self.weights)
        more = {n: self.taken.get(n, 0) + count for n, count in zip(names, counts, strict=True)}
        return {**self.taken, **more}


@dataclass(frozen=True, kw_only=True)
class MixtureOrder:
    """The order of the samples of a run over a mixture, from the newest segment on.

    Rows are numbered as in `launcher.data.joined`: those of the sources one after another.
    """

    sources: tuple[SourceOrder, ...]
    """In the order of their names."""
    seed: int
    """Of the run: that of each source follows from it."""
    segments: tuple[Segment, ...]
    """Oldest first; the last one decides the order."""
    epoch_samples: int
    """Samples that count as one epoch of the mixture."""

    @property
    def size(self) -> int:
        """Rows of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def segment(self) -> Segment:
        """The newest segment."""
        return self.segments[-1]

    @property
    def shares(self) -> dict[str, Fraction]:
        """Share of each source in the samples."""
        total = sum(self.segment.weights.values())
        return {name: Fraction(weight, total) for name, weight in self.segment.weights.items()}

    def row(self, global_sample: int) -> int:
        """The row of one global sample."""
        return int(self.rows(np.array([global_sample], dtype=np.int64))[0])

    def rows(self, global_samples: npt.ArrayLike) -> Ints:
        """The rows of many global samples (any shape, any order): int64 of the same shape.

        Raises ValueError for a sample before the newest segment.
        """
        samples = np.asarray(global_samples, dtype=np.int64)
        sources, numbers = self.locate(samples)
        rows = np.empty_like(samples)
        for index, order in enumerate(self._orders):
            own = sources == index
            rows[own] = order.rows(numbers[own]) + self._starts[index]
        return rows

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """For global samples: the index of the source of each, and its number among the samples
        that the run takes from that source, from 0."""
        if samples.size and int(samples.min()) < self.segment.from_sample:
            raise ValueError(
                f"sample {int(samples.min())} is before {self.segment.from_sample}, where the "
                "weights of the mixture were set"
            )
        sources, numbers = self.segment.blend.locate(samples - self.segment.from_sample)
        return sources, numbers + self._bases[sources]

    def taken(self, position: int) -> list[int]:
        """Samples taken from each source before the global sample `position`."""
        taken = self.segment.taken_before(position)
        return [taken[source.name] for source in self.sources]

    @cached_property
    def _bases(self) -> Ints:
        taken = self.segment.taken
        return np.array([taken.get(source.name, 0) for source in self.sources], dtype=np.int64)

    @cached_property
    def _orders(self) -> tuple[GlobalOrder, ...]:
        return tuple(
            GlobalOrder(source.rows, source.seed, source.shuffle) for source in self.sources
        )

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return (0, *accumulate(source.rows for source in self.sources))


def source_seed(seed: int, name: str) -> int:
    """The seed of the order of a source: it depends on its name, not on the other sources."""
    return xxh3_64_intdigest(f"{seed}/{name}".encode())


def exact(number: float) -> Fraction:
    """The number as it was written: 0.1 is one tenth."""
    return Fraction(str(number))


class Portion(NamedTuple):
    """What a mixture should have of a source: a weight, or passes over its rows."""

    rows: int
    weight: float | None = None
    epochs: float | None = None
    """None counts as 1 where there is no weight."""

    @property
    def samples(self) -> Fraction:
        """Samples of an epoch by the passes."""
        return self.rows * exact(1 if self.epochs is None else self.epochs)


def shares(portions: Sequence[Portion]) -> tuple[list[Fraction], int]:
    """The shares of the sources in a mixture, whose sum is 1, and the samples of an epoch of it.

    With a weight for every source the weights are relative, and an epoch has as many samples as
    there are rows. With weights for some of them these are shares of the mixture, below 1 together
    (ValueError); the others get the rest by rows and passes, and an epoch goes through them as
    often as their `epochs`.
    """
    weights = [exact(found.weight) for found in portions if found.weight is not None]
    by_size = [found.samples for found in portions if found.weight is None]
    if not by_size:
        return [w / sum(weights) for w in weights], sum(found.rows for found in portions)
    rest = 1 - sum(weights, Fraction(0))
    if rest <= 0:
        raise ValueError(f"the weights add up to {float(1 - rest):g}, nothing is left")
    epoch = sum(by_size, Fraction(0)) / rest
    found_shares = [
        exact(found.weight) if found.weight is not None else found.samples / epoch
        for found in portions
    ]
    return found_shares, max(round(epoch), 1)


def mixture_order(
    sources: Sequence[SourceOrder], portions: Mapping[str, Portion], seed: int
) -> MixtureOrder:
    """The order of a run that begins with these sources. `portions`: by name of the source."""
    sources = sorted(sources, key=lambda source: source.name)
    found, epoch = shares([portions[source.name] for source in sources])
    weights = integer_weights(found)
    names = [source.name for source in sources]
    first = Segment(0, dict(zip(names, weights, strict=True)), {})
    return MixtureOrder(sources=tuple(sources), seed=seed, segments=(first,), epoch_samples=epoch)
