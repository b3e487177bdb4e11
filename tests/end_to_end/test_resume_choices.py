"""What a resume can be configured to do: start at another position or in other data; and its
errors. The reference's acceptance behaviours E07, F05 and X03 (and X08: its source is only read).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

CUT: dict[str, Any] = {
    "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2,
                        "micro_batch_num": 2},
    "runner_config": {"batch_size": 2},
}  # fmt: skip


def start(workshop: Workshop, name: str, output: str, *more: str, world: int = 1) -> JobResult:
    arguments = ["--config", name, "--run_mode", "train", "--output_dir", output, *more]
    return run_job(arguments, workshop.folder, world)


def resume(workshop: Workshop, name: str, output: str, *more: str, world: int = 1) -> JobResult:
    if "--resume_training" not in more:
        more = ("--resume_training", "True", *more)
    result = start(workshop, name, output, *more, world=world)
    assert result.code == 0, result.stderr
    return result


def other_text(workshop: Workshop) -> str:
    """A second data set."""
    folder = workshop.folder / "other_text"
    folder.mkdir()
    for path in sorted((workshop.folder / "corpus").iterdir()):
        (folder / path.name).write_text(path.read_text()[::-1])
    return folder.name


def test_skipping_exactly_what_was_trained_on_is_resuming(workshop: Workshop) -> None:
    name = workshop.yaml()
    assert start(workshop, name, "whole").code == 0
    source = ("--load_checkpoint", "whole/checkpoint", "--resume_training", "CKP_rank_0-1_10")
    losses = {}
    for skipped in ("10", "3"):
        result = resume(workshop, name, skipped, *source, "--data_skip_steps", skipped)
        assert f"beginning at sample {8 * int(skipped)}, as configured" in result.stdout
        losses[skipped] = workshop.losses(skipped)
    assert losses["10"] == workshop.losses("whole")[10:]
    assert losses["3"] != losses["10"]


def test_a_skip_is_kept_by_the_resumes_after_it(workshop: Workshop) -> None:
    name = workshop.yaml()
    assert start(workshop, name, "first", "--runner_config.stop_step", "10").code == 0
    source = ("--load_checkpoint", "first/checkpoint", "--data_skip_steps", "3")
    resume(workshop, name, "at_once", *source)
    resume(workshop, name, "in_two", *source, "--runner_config.stop_step", "15")
    resume(workshop, name, "in_two")
    assert workshop.losses("in_two") == workshop.losses("at_once")
    consumed = [row["consumed_samples"] for row in workshop.rows("in_two")]
    assert consumed == [8 * step for step in range(11, 21)], "what was trained on, not the place"


@pytest.mark.parametrize(
    ("world", "changes"), [(1, {}), pytest.param(8, CUT, marks=pytest.mark.long)]
)
def test_other_data_then_a_skip_then_a_larger_batch(
    workshop: Workshop, world: int, changes: dict[str, Any]
) -> None:
    """E07: half of the saves are gone; then one by name; then twice the batch, half the steps."""
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 5}
    name = workshop.yaml(**changes, callbacks=[monitor])
    assert start(workshop, name, "output", world=world).code == 0
    for file in (workshop.folder / "output/checkpoint").rglob("*"):
        if file.stem.endswith(("1_15", "1_20")):
            file.unlink()
    other = ("--train_dataset.data_loader.dataset_dir", other_text(workshop))
    restarted = resume(workshop, name, "output", *other, "--ignore_data_skip", "True", world=world)
    assert "step 10 of 20" in restarted.stdout
    assert "other data, beginning at sample 0, as configured" in restarted.stdout
    assert [row["step"] for row in workshop.rows()] == [*range(1, 21)]
    named = ("--resume_training", "CKP_rank_0-1_15", "--load_checkpoint", "output/checkpoint")
    skipped = resume(workshop, name, "named", *other, *named, "--data_skip_steps", "2", world=world)
    assert "step 15 of 20" in skipped.stdout
    assert "data beginning at sample 16, as configured" in " ".join(skipped.stdout.split())
    batch = str(2 * changes.get("runner_config", {"batch_size": 8})["batch_size"])
    larger = resume(
        workshop, name, "output", *other, "--data_skip_steps", "1", "--batch_size", batch,
        "--max_steps", "13", world=world,
    )  # fmt: skip
    assert "global batch was 8, is 16: resuming after 160 samples, as step 10" in larger.stdout
    assert "beginning at sample 16, as configured" in larger.stdout
    rows = workshop.rows()[20:]
    assert [row["step"] for row in rows] == [11, 12, 13]
    assert [row["consumed_samples"] for row in rows] == [176, 192, 208]


def test_weights_without_optimizer_start_a_finetune_and_no_resume(workshop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 10, "save_optimizer": False}
    name = workshop.yaml(callbacks=[monitor])
    assert start(workshop, name, "output").code == 0
    held = load_file(workshop.folder / "output/checkpoint/rank_0/CKP_rank_0-1_20.safetensors")
    assert held
    assert not [name for name in held if name.startswith("adam_")]
    refused = start(workshop, name, "output", "--resume_training", "True", "--max_steps", "22")
    assert refused.code == 2
    assert "CKP_rank_0-1_20.safetensors holds weights without optimizer state" in refused.stderr
    assert "Use run_mode finetune to start from its weights" in refused.stderr
    tuned = run_job(["--config", name, "--run_mode", "finetune", "--output_dir", "tuned",
                     "--load_checkpoint", "output/checkpoint"], workshop.folder)  # fmt: skip
    assert tuned.code == 0, tuned.stderr
    assert workshop.losses("tuned")[0] < workshop.losses()[0] - 0.5


def test_another_layout_is_an_error_with_auto_trans_ckpt_false(workshop: Workshop) -> None:
    """X03, at a resume: both layouts are named, on every rank, before anything is read."""
    name = workshop.yaml()
    assert start(workshop, name, "output", "--max_steps", "10").code == 0
    two = ("--parallel_config.data_parallel", "2", "--batch_size", "4")
    refused = start(
        workshop, name, "output", *two, "--resume_training", "True", "--auto_trans_ckpt", "False",
        world=2,
    )  # fmt: skip
    assert refused.codes == [2, 2]
    assert "1 rank (not cut)" in refused.stderr
    assert "this run has 2 ranks (dp_replicate 2)" in refused.stderr


def stamps(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file: when it was written, its inode, its content."""
    return {
        str(path.relative_to(folder)):
            (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def test_the_folder_that_a_resume_reads_stays_as_it_is(workshop: Workshop) -> None:
    """X08: checkpoints of another folder are only read, whatever this run keeps of its own."""
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 5, "keep_checkpoint_max": 1}
    name = workshop.yaml(callbacks=[monitor])
    assert start(workshop, name, "store", "--runner_config.stop_step", "10").code == 0
    before = stamps(workshop.folder / "store")
    resume(workshop, name, "output", "--load_checkpoint", "store/checkpoint")
    assert stamps(workshop.folder / "store") == before


def test_the_save_that_a_run_was_resumed_from_is_kept(workshop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 5, "keep_checkpoint_max": 4}
    name = workshop.yaml(callbacks=[monitor])
    assert start(workshop, name, "output").code == 0
    resume(workshop, name, "output", "--resume_training", "CKP_rank_0-1_5")
    left = {path.stem for path in (workshop.folder / "output/checkpoint/manifest").iterdir()}
    assert left == {"CKP-1_5", "CKP_1-1_10", "CKP_1-1_15", "CKP_1-1_20", "CKP-1_20"}
