"""Histograms: of integers, as lines of text and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from launcher.report.progress import bar

MOST_BINS = 12


class Bin(NamedTuple):
    """How many values lie in [low, high]."""

    low: int
    high: int
    count: int


def bins_of(values: npt.NDArray[np.int64]) -> list[Bin]:
    """At most `MOST_BINS` bins from the smallest to the largest value, of equal width, or, where
    the largest is more than ten times the smallest, each about as much larger as the one before."""
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    if high - low < MOST_BINS:
        edges = np.arange(low, high + 2)
    elif high <= 10 * max(low, 1):
        edges = np.linspace(low, high + 1, MOST_BINS + 1).astype(np.int64)
    else:
        edges = np.geomspace(max(low, 1), high + 1, MOST_BINS + 1).round().astype(np.int64)
        edges[0], edges[-1] = low, high + 1
        edges = np.unique(edges)
    counts, _ = np.histogram(values, bins=edges)
    return [Bin(int(edges[i]), int(edges[i + 1]) - 1, int(count)) for i, count in enumerate(counts)]


def lines(bins: Sequence[Bin], what: str) -> list[str]:
    """One line a bin: range, bar, count and share."""
    total, most = sum(b.count for b in bins), max((b.count for b in bins), default=1)
    ranges = [f"{b.low:,}" if b.low == b.high else f"{b.low:,} to {b.high:,}" for b in bins]
    width = max(map(len, ranges), default=0)
    return [
        f"{text:>{width}} {what}  {bar(b.count / most)} {b.count:,} ({b.count / total:.1%})"
        for text, b in zip(ranges, bins, strict=True)
    ]


def draw(named: Mapping[str, Sequence[Bin]], path: Path, xlabel: str, ylabel: str) -> None:
    """Plot one histogram for each name, one below the other. The file is replaced atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 + 3 * len(named)), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, bins) in enumerate(named.items(), 1):
        axes = figure.add_subplot(len(named), 1, index)
        labels = [f"{b.low:,}" if b.low == b.high else f"{b.low:,}–{b.high:,}" for b in bins]
        axes.bar(range(len(bins)), [b.count for b in bins], color="#3182bd")
        axes.set_xticks(range(len(bins)), labels, rotation=30, ha="right", fontsize=8)
        axes.set(title=name, xlabel=xlabel, ylabel=ylabel)
        axes.grid(axis="y", alpha=0.3)
    scratch = path.with_suffix(".tmp.png")
    figure.savefig(scratch, dpi=120)
    os.replace(scratch, path)
