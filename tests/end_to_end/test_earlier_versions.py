"""Checkpoints, manifests and strategy files of an earlier version still resume, merge and slice.

`tests/fixtures/earlier/README.md` says how they were made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from launcher.tools import merge_strategy, slice_safetensors, unified_safetensors, verify
from tests.ranks import run_job
from tests.workshop import merged

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"
RUNS = ("tensor", "shards", "pipeline")
SUFFIX = ["--file_suffix", "1_3"]
SAVED_STEP = 3


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return shutil.copytree(EARLIER, tmp_path / "earlier")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()[:32]


def digests(folder: Path) -> dict[str, str]:
    """Tensor name to the digest of its bytes, over all safetensors files of a folder."""
    tensors = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: digest(value) for file in tensors for name, value in file.items()}


def merge(source: Path, target: Path) -> dict[str, str]:
    arguments = ["--mindspore_ckpt_dir", str(source), "--output_dir", str(target), *SUFFIX]
    assert unified_safetensors.main(arguments) == 0
    return digests(target)


@pytest.mark.parametrize("run", RUNS)
def test_verified_and_merged(run: str, tmp_path: Path) -> None:
    checkpoint = EARLIER / run / "checkpoint"
    assert verify.main([str(checkpoint)]) == 0
    expected = json.loads((EARLIER / "digests.json").read_text())[run]
    assert merge(checkpoint, tmp_path / "complete") == expected


def test_the_network_alone_is_merged(tmp_path: Path) -> None:
    expected = json.loads((EARLIER / "digests.json").read_text())["shards"]
    merged_network = merge(EARLIER / "shards" / "checkpoint_network", tmp_path / "complete")
    assert merged_network == {
        name: value for name, value in expected.items() if not name.startswith("adam_")
    }


def test_strategy_files_merge_to_the_same_bytes_and_slice(tmp_path: Path) -> None:
    strategy = tmp_path / "merged.ckpt"
    source = EARLIER / "pipeline"
    assert merge_strategy.main(["--src", str(source / "strategy"), "--dst", str(strategy)]) == 0
    assert strategy.read_bytes() == (EARLIER / "merged_strategy.ckpt").read_bytes()
    complete = merge(source / "checkpoint", tmp_path / "complete")
    slices = tmp_path / "slices"
    assert slice_safetensors.main([
        "--unified_safetensors_dir", str(tmp_path / "complete"),
        "--dst_safetensors_dir", str(slices),
        "--predict_strategy", str(EARLIER / "merged_strategy.ckpt"),
    ]) == 0  # fmt: skip
    found: dict[str, str] = {}
    for rank in range(2):
        found |= digests(slices / f"rank_{rank}")
    assert found == {name: complete[name] for name in found}
    assert "lm_head.weight" in found
    assert "model.embed_tokens.weight" in found


ONE_RANK: dict[str, Any] = {
    "parallel_config": {"data_parallel": 1, "model_parallel": 1, "pipeline_stage": 1},
    "parallel": {"enable_parallel_optimizer": False},
    "runner_config": {"batch_size": 4},
}


@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("run", RUNS)
def test_resumed(run: str, ranks: int, earlier: Path) -> None:
    uninterrupted = {row["step"]: row["loss"] for row in rows(earlier / run / "metrics.jsonl")}
    if ranks == 1:
        config = yaml.safe_load((earlier / f"{run}.yaml").read_text())
        changed = merged(config, ONE_RANK)
        (earlier / f"{run}.yaml").write_text(yaml.safe_dump(changed))
    result = run_job(["--config", f"{run}.yaml", "--run_mode", "train", "--resume_training", "True",
                      "--load_checkpoint", f"{run}/checkpoint", "--output_dir", "resumed"],
                     earlier, ranks)  # fmt: skip
    assert result.code == 0, result.stderr
    _check_losses(earlier, uninterrupted)


def _check_losses(earlier: Path, uninterrupted: dict[int, float]) -> None:
    resumed = {row["step"]: row["loss"] for row in rows(earlier / "resumed" / "metrics.jsonl")}
    assert sorted(resumed) == [4, 5, 6]
    expected = {step: loss for step, loss in uninterrupted.items() if step > SAVED_STEP}
    assert resumed == pytest.approx(expected, rel=1e-5)


def test_gate_and_up_in_one_tensor_resume_tensor_parallel(earlier: Path) -> None:
    uninterrupted = {row["step"]: row["loss"] for row in rows(earlier / "glm" / "metrics.jsonl")}
    result = run_job(["--config", "glm.yaml", "--run_mode", "train", "--resume_training", "True",
                      "--load_checkpoint", "glm/checkpoint", "--output_dir", "resumed",
                      "--parallel_config.data_parallel", "1", "--runner_config.batch_size", "4",
                      "--parallel_config.model_parallel", "2", "--final_checkpoint", "True"],
                     earlier, 2)  # fmt: skip
    assert result.code == 0, result.stderr
    _check_losses(earlier, uninterrupted)
    names, before = (
        {name for name in digests(rank) if ".0.mlp." in name and not name.startswith("adam_")}
        for rank in (earlier / "resumed" / "checkpoint" / "rank_0",
                     earlier / "glm" / "checkpoint" / "rank_0")
    )  # fmt: skip
    assert before == {f"model.layers.0.mlp.{side}_proj.weight" for side in ("gate_up", "down")}
    assert names == {f"model.layers.0.mlp.{side}_proj.weight" for side in ("gate", "up", "down")}
