"""loss.png: the loss curve of a run, plotted from its metrics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE_NAME = "loss.png"
SMOOTHING = 0.9
SOURCE_LOSS = "loss/"
"""Beginning of the keys with the losses of the sources of a mixture."""
MAX_SOURCES = 10
"""Of more sources no curves are drawn."""


def draw_loss(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot training loss (per step and smoothed) and evaluation loss over the steps to `path`; of a
    mixture of few sources also the smoothed loss of each.

    Returns False without a training loss. The file is replaced atomically.
    """
    train = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    evaluation = [(r["step"], r["eval_loss"]) for r in rows if r.get("eval_loss") is not None]
    if not train:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [step for step, _ in train]
    losses = [loss for _, loss in train]
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, per step")
    axes.plot(steps, _smooth(losses), color="#08519c", linewidth=1.8, label="training, smoothed")
    for name, points in source_losses(rows).items():
        at, values = zip(*points, strict=True)
        axes.plot(at, _smooth(values), linewidth=1.0, alpha=0.8, label=name)
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color="#e6550d", label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    scratch = path.with_suffix(".tmp.png")
    figure.savefig(scratch, dpi=120)
    os.replace(scratch, path)
    return True


def source_losses(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of each source of a mixture; none where there are more than `MAX_SOURCES`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(SOURCE_LOSS) and value is not None:
                found.setdefault(key.removeprefix(SOURCE_LOSS), []).append((row["step"], value))
    return found if len(found) <= MAX_SOURCES else {}


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average with bias correction."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result
