"""A run that is killed again and again ends as one that is not (`make test-crash`)."""

from __future__ import annotations

import os
import random
import time

import pytest

from tests.end_to_end.test_processes import start
from tests.workshop import Workshop

pytestmark = pytest.mark.crash
KILLS = 6


def published(workshop: Workshop) -> list[str]:
    """Names of what counts as a checkpoint now."""
    folder = workshop.folder / "parts" / "checkpoint" / "manifest"
    return sorted(path.name for path in folder.glob("*.json")) if folder.is_dir() else []


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_saving_every_step(workshop: Workshop, seed: int) -> None:
    chance = random.Random(seed)
    name = workshop.yaml(
        runner_config={"epochs": 1, "max_steps": 60},
        callbacks=[
            {"type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 1}
        ],
        resume_training=True,
    )
    whole = start(workshop, "--config", name, "--run_mode", "train", "--output_dir", "whole")
    assert whole.wait() == 0
    kills = 0
    while True:
        before = published(workshop)
        process = start(workshop, "--config", name, "--run_mode", "train", "--output_dir", "parts")
        if kills < KILLS:
            while process.poll() is None and published(workshop) == before:
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.05))
            process.kill()
            kills += 1
        out, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode < 0, err + out
    assert workshop.losses("parts") == workshop.losses("whole")
    whole_file, parts_file = (
        next((workshop.folder / output / "checkpoint/rank_0").glob("*-1_60.safetensors"))
        for output in ("whole", "parts")
    )
    assert whole_file.read_bytes() == parts_file.read_bytes()
    left = os.listdir(parts_file.parent)
    assert sorted(left) == sorted(["meta.json", parts_file.name])
