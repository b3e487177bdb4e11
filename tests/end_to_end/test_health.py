"""Steps with a gradient norm far too large: skipped, or the end of a run that saved none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.checkpoint.published import published
from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

TWO = {"parallel_config": {"data_parallel": 2}, "runner_config": {"batch_size": 4}}


def train(workshop: Workshop, output: str, **changes: Any) -> JobResult:
    name = workshop.yaml(f"{output}.yaml", output_dir=output, **changes)
    world = 2 if "parallel_config" in changes else 1
    return run_job(["--config", name, "--run_mode", "train"], workshop.folder, world)


def norms(workshop: Workshop, output: str) -> list[float]:
    return [row["grad_norm"] for row in workshop.rows(output)]


@pytest.fixture
def largest(workshop: Workshop) -> tuple[int, float]:
    """(step, norm) of the largest gradient norm behind the first step of the plain run."""
    assert train(workshop, "plain").code == 0
    found = norms(workshop, "plain")
    step = max(range(1, len(found)), key=found.__getitem__)
    return step + 1, found[step]


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_steps_that_are_skipped(workshop: Workshop, ranks: str) -> None:
    changes: dict[str, Any] = TWO if ranks == "two" else {}
    limits = {"global_norm_spike_threshold": 1e-6, "global_norm_spike_count_threshold": 3}
    result = train(
        workshop, "output", use_skip_data_by_global_norm=True, monitor_config=limits, **changes
    )
    assert set(result.codes) == {2}
    rows = workshop.rows()
    assert [row["skipped"] for row in rows] == [True] * 4
    assert "is_skip: [True], step 1: gradient norm" in result.stdout
    assert "3 in a row of at most 3: samples 16 to 23 changed nothing" in result.stdout
    assert "samples 24 to 31: step 4: gradient norm" in result.stderr
    assert "global_norm_spike_count_threshold allows no more" in result.stderr
    abnormal = json.loads((workshop.folder / "output/abnormal_global_norm.json").read_text())
    assert [*abnormal] == ["1", "2", "3", "4"]
    assert abnormal["2"]["samples"] == [8, 15]


def test_a_run_that_ends_and_goes_on_without_the_samples(workshop: Workshop, largest) -> None:
    """It ends at the step, before that is saved; resumed, it skips it and comes to its end."""
    step, norm = largest
    limits = {"global_norm_spike_threshold": norm * 0.999}
    assert norms(workshop, "plain")[0] < norm
    monitor = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1}]
    result = train(
        workshop, "output", callbacks=monitor,
        monitor_config={**limits, "check_for_global_norm": True},
    )  # fmt: skip
    assert result.code == 2
    assert f"step {step}: gradient norm" in result.stderr
    assert "use_skip_data_by_global_norm: True" in result.stderr
    saves = published(workshop.folder / "output/checkpoint")
    assert saves[-1].manifest["global_step"] == step - 1
    again = train(
        workshop, "output", callbacks=monitor, monitor_config=limits,
        use_skip_data_by_global_norm=True, resume_training=True,
    )  # fmt: skip
    assert again.code == 0, again.stderr
    rows = {row["step"]: row for row in workshop.rows()}
    assert rows[step]["skipped"]
    assert rows[20]["loss"] > 0
    state = json.loads((workshop.folder / "output/checkpoint/state/CKP-1_20.json").read_text())
    skipped = sum(row.get("skipped", False) for row in rows.values())
    assert state["updates"] == 20 - skipped
