"""Unsound steps: skipped, the end of a run before they are saved, or rolled back; and the health of
saves (F07 of the reference's acceptance behaviours)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.checkpoint.catalog import published
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
    assert "3 in a row of at most 3: samples 16 to 23 are skipped" in result.stdout
    assert "samples 24 to 31: step 4: loss" in result.stderr
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
    assert f"step {step}: loss" in result.stderr
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


POISON = """
import torch
from launcher.train.callbacks import Callback

class Poison(Callback):
    \"\"\"Once, after step 9, a weight is no number.\"\"\"

    def __init__(self):
        self.left = True

    def on_steps_end(self, run, records):
        if self.left and records[-1].step == 9:
            self.left = False
            with torch.no_grad():
                next(run.model.parts.parameters()).fill_(float("nan"))
"""


@pytest.mark.parametrize("beside", [False, True], ids=["waits", "beside"])
def test_a_roll_back_leaves_the_samples_out(workshop: Workshop, beside: bool) -> None:
    """What comes of it is the run that a user would have resumed by hand."""
    (workshop.folder / "mine.py").write_text(POISON)
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 4, "async_save": beside}
    result = train(
        workshop, "output", callbacks=[monitor, {"type": "Poison"}], register_path="mine.py",
        check_for_nan_in_loss_and_grad=True, monitor_config={"roll_back": True}, **TWO,
    )  # fmt: skip
    assert result.codes == [0, 0], result.stderr
    assert "rolled back to CKP-1_8, step 8: step 10: loss nan" in result.stdout
    assert "Samples 64 to 79 are left out" in result.stdout
    assert train(workshop, "plain", callbacks=[monitor], **TWO).code == 0
    by_hand = train(
        workshop, "by_hand", callbacks=[monitor], load_checkpoint="plain/checkpoint",
        resume_training="CKP_rank_0-1_8", data_skip_steps=10, **TWO,
    )  # fmt: skip
    assert by_hand.code == 0, by_hand.stderr
    assert [row["step"] for row in workshop.rows()] == list(range(1, 21))
    assert workshop.losses() == workshop.losses("plain")[:8] + workshop.losses("by_hand")
    state = json.loads((workshop.folder / "output/checkpoint/state/CKP-1_20.json").read_text())
    assert (state["consumed_samples"], state["data_position"]) == (160, 176)


def test_a_run_that_keeps_rolling_back_ends(workshop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 1}
    assert train(workshop, "output", callbacks=[monitor],
                 runner_config={"stop_step": 2, "batch_size": 8}).code == 0  # fmt: skip
    limits = {
        "check_for_global_norm": True,
        "roll_back": True,
        "loss_spike_threshold": 1e-3,
        "global_norm_spike_threshold": 1e9,
        "global_norm_spike_count_threshold": 2,
    }
    result = train(
        workshop, "output", callbacks=[monitor], monitor_config=limits, resume_training=True
    )
    assert result.code == 2
    assert result.stdout.count("rolled back to CKP-1_2") == 2
    assert "roll_back: returned to CKP-1_2 2 times, the run ends" in result.stdout
    assert "samples 32 to 39: step 3: loss" in result.stderr, "further on in the data each time"
    assert "roll_back: True" not in result.stderr, "it is on"
    listed = json.loads((workshop.folder / "output/abnormal_global_norm.json").read_text())
    assert [row["samples"] for row in listed.values()] == [[16, 23], [24, 31], [32, 39]]


def test_a_run_never_rolls_back_to_a_save_of_another(workshop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 5}
    assert train(workshop, "output", callbacks=[monitor]).code == 0
    limits = {"check_for_global_norm": True, "roll_back": True, "loss_spike_threshold": 1e-3,
              "global_norm_spike_threshold": 1e9}  # fmt: skip
    result = train(workshop, "output", callbacks=[monitor], monitor_config=limits, seed=8)
    assert result.code == 2
    assert "roll_back: no save, the run ends" in result.stdout
    assert "rolled back" not in result.stdout
    behind = train(
        workshop, "output", callbacks=[monitor], monitor_config=limits,
        resume_training="CKP_rank_0-1_10",
    )  # fmt: skip
    assert "rolled back to CKP-1_10, step 10: step 11" in behind.stdout, "not on to step 20"


def test_a_roll_back_without_effect_is_logged(workshop: Workshop) -> None:
    stop = {"stop_step": 1, "batch_size": 8, "max_steps": 20}
    result = train(workshop, "output", monitor_config={"roll_back": True}, runner_config=stop)
    assert "roll_back: True has no effect: no check ends the run" in result.stdout
    result = train(workshop, "output", monitor_config={"roll_back": True}, runner_config=stop,
                   check_for_nan_in_loss_and_grad=True, callbacks=[])  # fmt: skip
    assert "roll_back: True has no effect: nothing is saved" in result.stdout


def test_unhealthy_saves_are_logged_recorded_and_skipped(workshop: Workshop) -> None:
    def run(output: str, threshold: float, *more: str, **others: Any) -> JobResult:
        monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 5,
                   "embedding_local_norm_threshold": threshold}  # fmt: skip
        name = workshop.yaml(f"{output}.yaml", output_dir=output, callbacks=[monitor],
                             use_checkpoint_health_monitor=True, **others)  # fmt: skip
        return run_job(["--config", name, "--run_mode", "train", *more], workshop.folder)

    assert run("plain", 1e9).code == 0
    norms = {row["step"]: row["embedding_norm"] for row in workshop.rows("plain")}
    assert all(0 < norms[row["step"]] < row["grad_norm"] for row in workshop.rows("plain"))
    threshold = sorted(norms[step] for step in (5, 10, 15, 20))[1] * 1.000001
    healthy = [step for step in (5, 10, 15, 20) if norms[step] <= threshold]
    result = run("output", threshold)
    assert result.code == 0, result.stderr
    record = json.loads((workshop.folder / "output/health_ckpts.json").read_text())
    assert record == [
        {"is_health": int(step not in healthy), "ckpt_name": f"CKP_rank_0-1_{step}.safetensors"}
        for step in (5, 10, 15, 20)
    ]
    assert result.stdout.count("is not healthy: the gradient norm of the embedding was") == 2
    again = run("output", threshold, resume_training=True)
    last = healthy[-1]
    assert f"resumed: CKP-1_{last} of" in again.stdout or last == 20
    named = run("named", threshold, "--load_checkpoint", "output/checkpoint",
                "--resume_training", "CKP_rank_0-1_10")  # fmt: skip
    assert "resumed: CKP-1_10 of" in named.stdout


def test_without_a_healthy_save_there_is_no_resume(workshop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 10,
               "embedding_local_norm_threshold": 1e-9,
               "use_checkpoint_health_monitor": True}  # fmt: skip
    assert train(workshop, "output", callbacks=[monitor]).code == 0
    refused = train(workshop, "output", callbacks=[monitor], resume_training=True)
    assert refused.code == 2
    assert "skipped CKP-1_20: it is not healthy" in refused.stdout
    assert "no checkpoint in output/checkpoint can be used" in refused.stderr


def test_a_step_that_overflowed_makes_no_save_unhealthy(workshop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 1,
               "embedding_local_norm_threshold": 1e9,
               "use_checkpoint_health_monitor": True}  # fmt: skip
    scale = {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 2**40, "scale_factor": 16,
             "scale_window": 1000}  # fmt: skip
    result = train(
        workshop, "output", callbacks=[monitor], runner_wrapper={"scale_sense": scale},
        model={"model_config": {"compute_dtype": "float16"}},
        runner_config={"stop_step": 8, "batch_size": 8, "max_steps": 20},
    )  # fmt: skip
    assert result.code == 0, result.stderr
    overflowed = [row["overflow"] for row in workshop.rows()]
    assert overflowed[0]
    assert not overflowed[-1]
    assert "is not healthy" not in result.stdout


def test_the_norm_of_the_embedding_is_that_of_one_process(workshop: Workshop) -> None:
    four = {"parallel_config": {"model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 4},
            "runner_config": {"batch_size": 2, "stop_step": 4}}  # fmt: skip
    found = []
    for output, world, changes in (("one", 1, {}), ("four", 4, four)):
        name = workshop.yaml(f"{output}.yaml", output_dir=output, callbacks=[],
                             use_checkpoint_health_monitor=True, **changes)  # fmt: skip
        result = run_job(["--config", name, "--run_mode", "train"], workshop.folder, world)
        assert result.code == 0, result.stderr
        found.append([row["embedding_norm"] for row in workshop.rows(output)][:4])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
