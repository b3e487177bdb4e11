"""The best save by its manifests, and best.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.best import BestRule, best_rule, publish_best, withdraw_best
from launcher.checkpoint.catalog import Published
from launcher.checkpoint.names import SaveName
from launcher.config.schema import CheckpointMonitorSection

LOWEST, HIGHEST = BestRule("eval_loss", "min"), BestRule("eval_loss", "max")


def save(step: int, loss: Any = None, **more: Any) -> Published:
    """A published save; without `loss` its step was not evaluated."""
    evaluation = {} if loss is None else {"evaluation": {"eval_loss": loss}}
    manifest = {"sequence": step, "global_step": step, "files": [{}], **evaluation, **more}
    return Published(Path("checkpoint"), SaveName("CKP", 0, 1, step), manifest)


@pytest.mark.parametrize(
    ("losses", "lowest", "highest"),
    [
        ([3.0, 1.0, 2.0], 2, 1),
        ([3.0, None, 2.0], 3, 1),
        ([2.0, 2.0, 2.0], 1, 1),  # the earliest of equal ones
        ([math.nan, 5.0, math.inf], 2, 2),
        ([None, None, None], None, None),
        (["1", True, 4], 3, 3),  # only numbers count
    ],
)
def test_the_best_of_saves(losses: list[Any], lowest: int | None, highest: int | None) -> None:
    saves = [save(step, loss) for step, loss in enumerate(losses, 1)]
    for rule, expected in ((LOWEST, lowest), (HIGHEST, highest)):
        found = rule.best(saves)
        assert (found.name.step if found else None) == expected


def test_a_manifest_with_other_content_has_no_value() -> None:
    for content in ([], "x", {"eval_loss": None}, {}):
        assert LOWEST.value(save(1, evaluation=content)) is None
    assert LOWEST.value(save(1, 2.5).without_files()) == 2.5


def test_best_json_is_written_renamed_and_withdrawn(tmp_path: Path) -> None:
    assert publish_best(tmp_path, LOWEST, [save(1), save(2)]) is None
    assert list(tmp_path.iterdir()) == []
    saves = [save(1, 3.0), save(2, 1.0), save(3, 2.0)]
    publish_best(tmp_path, LOWEST, saves)
    record = json.loads((tmp_path / "best.json").read_text())
    assert record == {"save": "CKP-1_2", "file": "rank_0/CKP_rank_0-1_2.safetensors", "step": 2,
                      "metric": "eval_loss", "mode": "min", "value": 1.0}  # fmt: skip
    before = (tmp_path / "best.json").stat().st_mtime_ns
    publish_best(tmp_path, LOWEST, saves)
    assert (tmp_path / "best.json").stat().st_mtime_ns == before  # nothing has changed
    withdraw_best(tmp_path, ["CKP-1_1", "CKP-1_3"])
    assert (tmp_path / "best.json").exists()
    withdraw_best(tmp_path, ["CKP-1_2"])
    assert list(tmp_path.iterdir()) == []


def test_only_keep_best_has_a_rule() -> None:
    assert best_rule(CheckpointMonitorSection()) is None
    section = CheckpointMonitorSection(keep_best=True, best_metric="eval_loss/x", best_mode="max")
    assert best_rule(section) == BestRule("eval_loss/x", "max")
