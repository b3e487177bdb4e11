"""Blends: several datasets by weight, in the order of Megatron-core or MindFormers.

Owns what `data_path` means, how many samples each dataset contributes, and which dataset the k-th
sample of a blend is from: the one that is furthest behind its share, the first of them on a tie.

    requested                   of each dataset                 of the blend
    Megatron-core 0.16          ceil(ceil(size * w) * 1.005)    sum of ceil(size * w)
    MindFormers (July 2026)     ceil(size * w * 1.005)          sum of ceil(size * w * 1.005)
    without weights             one epoch                       min(size, all), or all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.megatron.data_path import BlendSpec
from launcher.errors import UserError

SURPLUS = 1.005
"""More samples are prepared than a blend needs on average."""
LARGEST_BLEND = 32767
"""Datasets of a blend: their numbers are int16."""
_VECTORISED_FROM = 24
"""Datasets from which numpy is faster than a loop."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """How many samples are requested."""

    each: list[int | None]
    """Of each dataset; None: one epoch."""
    blend: int | None
    """Of the blend; None: as many as all datasets have."""
    weights: list[float] | None
    """None: by the samples that the datasets have."""


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights with the sum 1, rounded as numpy does."""
    array = np.array(weights, dtype=np.float64)
    shares: list[float] = (array / np.sum(array)).tolist()
    return shares


def requests(blend: BlendSpec, size: int | None, *, mindformers_sizes: bool) -> Requests:
    """The samples to request for `size` samples of the split. Raises UserError for weights without
    a size."""
    if blend.weights is None:
        return Requests(each=[None] * len(blend.prefixes), blend=size, weights=None)
    if size is None:
        raise UserError(
            "data_path has weights, but sizes has no number of samples for the split",
            rule="sizes is the length of a blend by weight",
            advice="Set data_loader.sizes, or remove the weights to use all samples",
        )
    weights = normalized(blend.weights)
    if mindformers_sizes:
        each = [ceil(size * weight * SURPLUS) for weight in weights]
        return Requests(each=list(each), blend=sum(each), weights=weights)
    targets = [ceil(size * weight) for weight in weights]
    return Requests(
        each=[ceil(target * SURPLUS) for target in targets], blend=sum(targets), weights=weights
    )


@dataclass(frozen=True, kw_only=True)
class BlendOrder:
    """Which sample of which dataset the items of a blend are."""

    dataset: npt.NDArray[np.int16]
    sample: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.dataset)


def build_blend(wanted: Requests, lengths: Sequence[int], names: Sequence[str]) -> BlendOrder:
    """The order of a blend of datasets with so many samples; `names` are for messages.

    Raises UserError where it needs more samples of a dataset than there are.
    """
    if wanted.weights is None:
        size = sum(lengths) if wanted.blend is None else min(wanted.blend, sum(lengths))
        weights = normalized(lengths)
        dataset = _mix_all(lengths) if wanted.blend is None else _mix(normalized(weights), size)
    else:
        dataset = _mix(normalized(wanted.weights), wanted.blend or 0)
    order = BlendOrder(dataset=dataset, sample=_numbers(dataset, len(lengths)))
    counts = np.bincount(dataset, minlength=len(lengths))
    for name, count, length in zip(names, counts.tolist(), lengths, strict=True):
        if count > length:
            raise UserError(
                f"the blend needs {count} samples of {name}, which has {length}",
                rule="it never reads past the end of a dataset",
                advice="Make sizes larger, merge small datasets, or give it less weight",
            )
    return order


def _numbers(dataset: npt.NDArray[np.int16], count: int) -> npt.NDArray[np.int64]:
    """For each item, how many items before it are of the same dataset."""
    numbers = np.empty(len(dataset), dtype=np.int64)
    for index in range(count):
        places = np.flatnonzero(dataset == index)
        numbers[places] = np.arange(len(places))
    return numbers


def _mix(weights: Sequence[float], size: int) -> npt.NDArray[np.int16]:
    """The dataset of each item: the largest weight * max(item, 1) - taken."""
    if len(weights) == 1:
        return np.zeros(size, dtype=np.int16)
    if len(weights) >= _VECTORISED_FROM:
        return _mix_many(np.array(weights), size)
    found = np.empty(size, dtype=np.int16)
    taken = [0.0] * len(weights)
    numbered = list(enumerate(weights))
    for item in range(size):
        position = float(item) if item else 1.0
        best, largest = 0, weights[0] * position - taken[0]
        for index, weight in numbered:
            behind = weight * position - taken[index]
            if behind > largest:
                best, largest = index, behind
        found[item] = best
        taken[best] += 1.0
    return found


def _mix_many(weights: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.int16]:
    found = np.empty(size, dtype=np.int16)
    taken = np.zeros(len(weights))
    for item in range(size):
        best = int(np.argmax(weights * max(item, 1) - taken))
        found[item] = best
        taken[best] += 1.0
    return found


def _mix_all(lengths: Sequence[int]) -> npt.NDArray[np.int16]:
    """All items of all datasets: one that is used up leaves the race."""
    total = sum(lengths)
    weights = np.array([length / total for length in lengths])
    found = np.empty(total, dtype=np.int16)
    taken: npt.NDArray[Any] = np.zeros(len(lengths))
    taken[np.array(lengths) == 0] = np.inf
    for item in range(total):
        best = int(np.argmax(weights * max(item, 1) - taken))
        found[item] = best
        taken[best] += 1.0
        if taken[best] == lengths[best]:
            taken[best] = np.inf
    return found
