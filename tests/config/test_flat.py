"""The flat configuration of a save: what it holds, what it leaves out, and that JSON keeps it."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from launcher.config.flat import OF_ONE_START, _section, flat
from tests.config.test_printing import RICH
from tests.config.test_resolve import resolved


def flat_of(text: str, *overrides: str) -> dict[str, Any]:
    return flat(resolved(text, *overrides).config)


def test_values_stand_under_the_keys_of_the_command_line(workspace: Path) -> None:
    found = flat_of(RICH, "optimizer.eps=0.5")
    expected = {
        "seed": 3,
        "optimizer.eps": 0.5,
        "optimizer.betas": [0.8, 0.9],
        "runner_config.epochs": 1,
        "train_dataset.data_loader.dataset_files": ["a.txt", "b c.txt"],
        "model.model_config.type": "Qwen3Config",
        "model.model_config.rope_scaling.factor": 2.0,
        "model.model_config.rope_scaling.list.0": [1, 2],
        "callbacks.0.prefix": "a: b",
        "callbacks.1.type": "Mine",
        "callbacks.1.deep.x.0": 1,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_what_does_nothing_is_left_out(workspace: Path) -> None:
    found = flat_of(RICH)
    assert not any(value is None for value in found.values())
    assert "train_dataset.num_parallel_workers" not in found, "accepted, no effect"
    assert not any(key.startswith("checkpoint.") for key in found), "not built yet"
    assert not any(key.startswith("callbacks.2") for key in found), "ObsMonitor"


@pytest.mark.parametrize("text", ["", RICH])
def test_json_keeps_it(workspace: Path, text: str) -> None:
    found = flat_of(text)
    assert json.loads(json.dumps(found)) == found


def test_another_start_of_the_same_run_has_the_same(workspace: Path) -> None:
    again = ("output_dir=other", "resume_training=True", "load_checkpoint=x", "use_parallel=True")
    assert flat_of(RICH, *again, "callbacks.0.directory=/elsewhere") == flat_of(RICH)
    assert flat_of(RICH, "seed=4") != flat_of(RICH)


def test_keys_of_one_start_are_keys_of_the_schema(workspace: Path) -> None:
    config = resolved(
        "callbacks: [{type: CheckpointMonitor}]\ntrain_dataset: {packing: True}\n"
    ).config
    keys = [key for key, _ in _section(config, "")]
    for pattern in OF_ONE_START:
        assert any(fnmatchcase(key, pattern) for key in keys), pattern
