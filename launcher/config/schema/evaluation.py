"""Sections about evaluation: named evaluation sets, and when a run ends early."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.data import DatasetSection
from launcher.config.schema.field import effective

METRIC_MODES = ("min", "max")


@dataclass(frozen=True, kw_only=True)
class NamedDatasetSection(DatasetSection):
    """An entry of `eval_datasets`: a data section with a name."""

    name: str = ""
    """What metrics call the set, `eval_loss/<name>`: letters, digits, `.`, `_`, `-`."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingSection:
    """`EarlyStopping`: ends a run, saved and with exit code 0, when an evaluation metric no longer
    improves. Its state is saved: a resumed run ends at the same step."""

    type: str = "EarlyStopping"
    """Always `EarlyStopping`."""
    metric: str = "eval_loss"
    """Key of the evaluation rows of `metrics.jsonl`, such as `eval_loss/code`."""
    patience: int = effective(3, minimum=1)
    """Evaluations in a row without improvement after which the run ends."""
    min_delta: float = effective(0.0, minimum=0)
    """A value improves on the best one only if it is better by more than this."""
    mode: str | None = effective(None, choices=METRIC_MODES)
    """Whether lower (`min`) or higher (`max`) values are better. Left out: `min` for losses and
    perplexities, `max` for rewards, margins and accuracies."""
