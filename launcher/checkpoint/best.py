"""The best save of a run by an evaluation metric (`keep_best`), and `best.json`, which names it.

    manifest/CKP-1_20.json   {..., "evaluation": {"eval_loss": 2.31, ...}, ...}
    best.json                {"save": "CKP-1_20", "file": "rank_0/...", "metric": "eval_loss", ...}

Owns which save is the best: a pure question of the manifests, which hold the evaluation of their
step, so that a resumed run knows it without further state. Invariants: `best.json` names a
published save; it is replaced after a better one is published, and before any save is removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.catalog import Published
from launcher.checkpoint.files import read_json, write_json
from launcher.config.evaluation import mode_of
from launcher.config.schema import CheckpointMonitorSection
from launcher.weights.ranks.manifests import BEST_FILE, EVALUATION

__all__ = ["BEST_FILE", "EVALUATION", "BestRule", "best_rule", "publish_best", "withdraw_best"]


@dataclass(frozen=True)
class BestRule:
    """Which save is the best: that with the lowest (`min`) or highest (`max`) metric."""

    metric: str
    mode: str

    def value(self, save: Published) -> float | None:
        """The metric at the step of a save; None where it was not evaluated, or is not finite."""
        evaluation = save.manifest.get(EVALUATION)
        found = evaluation.get(self.metric) if isinstance(evaluation, Mapping) else None
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return float(found) if is_number and math.isfinite(found) else None

    def best(self, saves: Iterable[Published]) -> Published | None:
        """The best of `saves`, the earliest of equal ones; None where none was evaluated."""
        sign = 1 if self.mode == "min" else -1
        known = [(sign * value, save.sequence, save) for save in saves
                 if (value := self.value(save)) is not None]  # fmt: skip
        return min(known, key=lambda entry: entry[:2])[2] if known else None

    def record(self, save: Published) -> dict[str, Any]:
        """The content of `best.json`."""
        return {
            "save": str(save.name),
            "file": f"rank_0/{save.name.rank_file(0)}",
            "step": save.manifest.get("global_step"),
            "metric": self.metric,
            "mode": self.mode,
            "value": self.value(save),
        }


def best_rule(config: CheckpointMonitorSection) -> BestRule | None:
    """The rule of the configuration; None: no save is kept for its metric."""
    if not config.keep_best:
        return None
    return BestRule(config.best_metric, mode_of(config.best_metric, config.best_mode))


def publish_best(root: Path, rule: BestRule, saves: Iterable[Published]) -> Published | None:
    """Make `best.json` in folder `root` name the best of `saves`. Returns that save.

    Written under another name and renamed. Nothing is written where none was evaluated.
    """
    best = rule.best(saves)
    if best is not None and read_json(root / BEST_FILE) != (record := rule.record(best)):
        write_json(root / BEST_FILE, record)
    return best


def withdraw_best(root: Path, removed: Iterable[str]) -> None:
    """Remove `best.json` if it names one of the saves that are about to be removed."""
    content = read_json(root / BEST_FILE)
    if content is not None and content.get("save") in set(removed):
        (root / BEST_FILE).unlink(missing_ok=True)
