"""Early stopping: when a run ends because an evaluation metric no longer improves.

Owns the rule. Its state is a part of the state of the run, which is saved after the evaluation of a
step: a resumed run, on any layout, ends at the step at which the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.config.evaluation import mode_of
from launcher.config.schema import EarlyStoppingSection
from launcher.errors import UserError


@dataclass(frozen=True)
class StoppingState:
    """What EarlyStopping has seen of one metric."""

    metric: str = ""
    """Its name; empty before the first evaluation."""
    best: float | None = None
    """The best value; None before the first finite one."""
    best_step: int = 0
    """The step with that value."""
    without: int = 0
    """Evaluations since then without improvement."""

    def after(self, section: EarlyStoppingSection, step: int, value: float | None) -> StoppingState:
        """The state after an evaluation of step `step` with this value; one that is not finite is
        no improvement. A state of another metric is forgotten."""
        known = self if self.metric == section.metric else StoppingState(section.metric)
        is_finite = value is not None and math.isfinite(value)
        if is_finite and (known.best is None or is_better(value, known.best, section)):
            return StoppingState(section.metric, value, step)
        return StoppingState(section.metric, known.best, known.best_step, known.without + 1)

    def is_due(self, section: EarlyStoppingSection) -> bool:
        """Whether the run ends."""
        return self.metric == section.metric and self.without >= section.patience


def is_better(value: float, best: float, section: EarlyStoppingSection) -> bool:
    """Whether `value` improves on `best` by more than `min_delta`."""
    gain = best - value if mode_of(section.metric, section.mode) == "min" else value - best
    return gain > section.min_delta


def stopping_from_json(content: Any, where: str) -> StoppingState:
    """The state in a state file; a new one where it has none. Raises `UserError` for other
    content."""
    if content is None:
        return StoppingState()
    if isinstance(content, Mapping) and _is_right(content):
        return StoppingState(**content)
    raise UserError(
        f"stopping = {content!r}",
        where=where,
        rule="it must have metric, best, best_step and without",
        advice="Resume from another checkpoint",
    )


def _is_right(content: Mapping[str, Any]) -> bool:
    kinds: dict[str, Any] = {"metric": str, "best": int | float | None, "best_step": int,
                             "without": int}  # fmt: skip
    return content.keys() == kinds.keys() and all(
        isinstance(content[key], kind) and not isinstance(content[key], bool)
        for key, kind in kinds.items()
    )
