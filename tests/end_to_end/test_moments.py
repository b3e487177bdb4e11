"""Runs with bfloat16 moments, and recompute by operation: resumed bit by bit, and converted."""

from __future__ import annotations

import shutil

import pytest

from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

NARROW = "optimizer.state_dtype=bfloat16"


def train(workshop: Workshop, output: str, *more: str) -> JobResult:
    name = workshop.yaml("run.yaml", runner_config={"max_steps": 8}, callbacks=[])
    result = run_job(
        ["--config", name, "--run_mode", "train", "--output_dir", output, *more],
        workshop.folder, 1,
    )  # fmt: skip
    assert result.code == 0, result.stderr + result.stdout
    return result


@pytest.mark.long
def test_a_run_resumes_bitwise_and_with_moments_of_the_other_dtype(workshop: Workshop) -> None:
    first = train(workshop, "full", NARROW, "recompute_config.memory_budget=0.5")
    assert first.stdout.count("recompute by operation: ") == 1
    assert "moments of the optimizer in bfloat16" in first.stdout
    keep_products = "recompute_config.recompute_operations=True"
    train(workshop, "parts", NARROW, keep_products, "--runner_config.stop_step", "4")
    shutil.copytree(workshop.folder / "parts", workshop.folder / "wide")
    train(workshop, "parts", NARROW, "--resume_training", "True")
    full, parts = workshop.saved("full", "1_8"), workshop.saved("parts", "1_8")
    differ = [key for key in full if full[key] != parts[key]]
    assert differ == ["state/CKP-1_8.json"], "which records the configuration"
    assert workshop.losses("full") == workshop.losses("parts")
    wide = train(workshop, "wide", "--resume_training", "True")
    assert "optimizer state: bfloat16 in CKP-1_4, float32 in this run" in wide.stdout
    assert workshop.losses("wide")[-1] == pytest.approx(workshop.losses("full")[-1], rel=1e-3)
    back = train(workshop, "wide", NARROW, "--resume_training", "True", "--max_steps", "9")
    assert "optimizer state: float32 in CKP-1_8, bfloat16 in this run" in back.stdout
