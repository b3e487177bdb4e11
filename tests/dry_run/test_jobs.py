"""Jobs of `run.py` on a virtual GPU: training, saving, resuming, evaluation and prediction."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dry_run.driver import job_on_rank
from tests.ranks import run_ranks
from tests.workshop import Workshop

TRAIN = ("--config", "run.yaml", "--run_mode", "train", "--compile", "False")
PREDICT = ("--config", "run.yaml", "--run_mode", "predict", "--predict_data", "def f(",
           "--load_checkpoint", "output/checkpoint", "generation_config.max_new_tokens=5",
           "generation_config.cuda_graphs=False")  # fmt: skip
SAVING = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "async_save": True}]
CHANGES: dict[str, Any] = {
    "context": {"device_target": "GPU"}, "callbacks": SAVING,
    "runner_config": {"max_steps": 4, "stop_step": 4},
    "do_eval": True, "eval_step_interval": 2,
    "eval_dataset": {"data_loader": {"type": "TextDataLoader", "dataset_dir": "heldout"},
                     "seq_length": 32, "packing": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {"parallel_config": {"model_parallel": 2}}),
        (2, {"parallel_config": {"data_parallel": 2},
             "parallel": {"enable_parallel_optimizer": True}}),
    ],
    ids=["alone", "tp", "sharded"],
)  # fmt: skip
def test_a_job_from_its_start_to_its_answers(
    workshop: Workshop, ranks: int, changes: dict[str, Any]
) -> None:
    (workshop.folder / "heldout").mkdir()
    (workshop.folder / "heldout/text.txt").write_text("def held(out):\n    return out\n" * 20)
    workshop.yaml(**{**CHANGES, **changes})
    half = (*TRAIN, "--runner_config.stop_step", "2")
    jobs = [half, (*TRAIN, "--resume_training", "True"), (*TRAIN, "--output_dir", "whole"), PREDICT]
    found = run_ranks(ranks, job_on_rank, str(workshop.folder), jobs)
    for code, printed, reads in (job for rank in found for job in rank):
        assert code == 0, printed
        assert not reads, printed
    assert workshop.losses() == workshop.losses("whole")
    assert (workshop.folder / "output/text_generation_result.txt").read_text().strip()
