"""Runs on MindRecord data: the same losses on any number of ranks, and over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.mindrecord_writer import TOKENS, token_rows, write_mindrecord
from tests.ranks import run_job
from tests.workshop import Workshop

STEPS, SEQ_LENGTH, END = 6, 16, 2


@pytest.fixture
def place(workshop: Workshop) -> Workshop:
    """Rows of several documents in three files, and a configuration of batches of four rows."""
    random = np.random.default_rng(7)
    rows = random.integers(3, 500, size=(20, SEQ_LENGTH + 1))
    rows[random.random(rows.shape) < 0.15] = END
    write_mindrecord(workshop.folder / "x.mindrecord", TOKENS, token_rows(rows), shards=3)
    return workshop


def configuration(**changes: Any) -> dict[str, Any]:
    return {
        "train_dataset": {
            "data_loader": {"type": "MindDataset", "dataset_dir": "x.mindrecord0",
                            "eod_token_id": END},
            "seq_length": SEQ_LENGTH, "packing": False,
        },
        "processor": None,
        "runner_config": {"epochs": 2, "batch_size": 4, "max_steps": STEPS},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 3}],
        **changes,
    }  # fmt: skip


def train(place: Workshop, output: str, ranks: int, *words: str) -> list[float]:
    batch = ["--runner_config.batch_size", str(4 // ranks)]
    layout = ["--use_parallel", "True", "--parallel_config.data_parallel", str(ranks)]
    done = run_job(["--config", "run.yaml", "--run_mode", "train", "--output_dir", output, *batch,
                    *layout, *words], place.folder, ranks)  # fmt: skip
    assert done.code == 0, done.stderr + done.stdout
    return place.losses(output)


def test_the_number_of_ranks_and_a_resume_change_nothing(place: Workshop) -> None:
    place.yaml(**configuration())
    whole = train(place, "one", 1)
    assert len(whole) == STEPS
    stopped = train(place, "two", 2, "--runner_config.stop_step", "3")
    assert stopped == pytest.approx(whole[:3], abs=1e-5)
    resumed = train(place, "two", 1, "--resume_training", "True")
    assert resumed == pytest.approx(whole, abs=1e-5)
    assert len(list((place.folder / "two" / "dataset_cache").glob("mindrecord-*"))) == 1


def test_mistakes_end_before_a_process_starts(place: Workshop) -> None:
    place.yaml(**configuration())
    damaged = place.folder / "x.mindrecord1"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    done = run_job(["--config", "run.yaml", "--run_mode", "train"], place.folder)
    assert done.code == 2
    assert "x.mindrecord1: page 1 ends at byte" in done.stderr
    assert "run.yaml:" in done.stderr
    assert not Path(place.folder / "output").exists()
