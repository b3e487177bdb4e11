"""A run that resumes from a save of MindFormers goes on as from the same state under Hugging Face
names: weights, moments of the optimizer and the step, fused or not, on any layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher.weights.source import open_complete
from tests.mindspore import names_by_numpy as by_numpy
from tests.mindspore.names import Arrays, arrays, config_of, native, write_ranks
from tests.mindspore.test_twin_runs import LAYOUTS, Bench, bench
from tests.mindspore.twins import folder_of
from tests.ranks import run_job

__all__ = ["bench"]

STEP = 4
NUMBERS: Arrays = {
    "step_num": np.array(STEP), "global_step": np.array([STEP], np.int32),
    "epoch_num": np.array(1), "loss_scale": np.array([1.0], np.float32),
    "global_batch_size": np.array(2),
}  # fmt: skip
PREFIXES = ("adam_m.", "adam_v."), ("exp_avg.", "exp_avg_sq.")
Rename = Callable[[Arrays, dict[str, Any]], Arrays]


def _state(family: str, rename: Rename, prefixes: tuple[str, str]) -> Arrays:
    """Weights of a family and random moments of them, under the names of `rename`."""
    hf = native(arrays(open_complete(folder_of(family, "hf"))))
    config, numbers = config_of(family), np.random.default_rng(7)
    found = rename(hf, config)
    for prefix, size in zip(prefixes, (1e-2, 1e-3), strict=True):
        moments = {name: (size * numbers.random(v.shape)).astype(np.float32)
                   for name, v in hf.items()}  # fmt: skip
        found |= {prefix + name: v for name, v in rename(moments, config).items()}
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def _losses(bench: Bench, family: str, weights: Path, layout: str, *more: str) -> list[float]:
    world, degrees = LAYOUTS[layout]
    shutil.rmtree(bench.folder / "output", ignore_errors=True)
    arguments = [
        "--config",
        "steps.yaml",
        "--run_mode",
        "train",
        "--pretrained_model_dir",
        str(folder_of(family, "hf")),
        "--load_checkpoint",
        str(weights),
        "--resume_training",
        "True",
        "--runner_config.max_steps",
        str(STEP + 2),
    ]
    result = run_job([*arguments, *degrees, *more], bench.folder, world)
    assert result.code == 0, result.stderr + result.stdout
    rows = (bench.folder / "output" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(row) for row in rows]
    assert [row["step"] for row in found] == [STEP + 1, STEP + 2]
    return [row["loss"] for row in found]


def _one_rank(folder: Path, tensors: Arrays) -> Path:
    (folder / "rank_0").mkdir(parents=True)
    save_file(tensors | NUMBERS, folder / "rank_0/mf_rank_0-1_4.safetensors", {"format": "ms"})
    return folder


def _unchanged(hf: Arrays, config: dict[str, Any]) -> Arrays:
    return dict(hf)


def _fused(hf: Arrays, config: dict[str, Any]) -> Arrays:
    return by_numpy.legacy(hf, config, is_fused=True)


CASES: dict[str, tuple[str, Rename, list[str]]] = {
    "qwen2_5 legacy, fused": ("qwen2_5", _fused, []),
    "qwen3 core": ("qwen3", by_numpy.core, ["--mindformers_qkv_order", "group",
                                            "--mindformers_mlp_order", "pair"]),
}  # fmt: skip


def _hugging_face(family: str) -> Arrays:
    return _state(family, _unchanged, PREFIXES[0])


def test_a_resume_uses_the_state(bench: Bench, tmp_path: Path) -> None:
    family, rename, keys = CASES["qwen2_5 legacy, fused"]
    full_state = _hugging_face(family)
    expected = _losses(bench, family, _one_rank(tmp_path / "hf", full_state), "one")
    state = _state(family, rename, PREFIXES[1])
    found = _losses(bench, family, _one_rank(tmp_path / "mf", state), "one", *keys)
    assert found == expected
    without = {n: v * 0 if n.startswith("adam") else v for n, v in full_state.items()}
    assert _losses(bench, family, _one_rank(tmp_path / "zero", without), "one")[1] != expected[1]


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_resume_from_rank_folders(
    bench: Bench, case: str, layout: str, tmp_path: Path
) -> None:  # fmt: skip
    family, rename, keys = CASES[case]
    expected = _losses(bench, family, _one_rank(tmp_path / "hf", _hugging_face(family)), "one")
    state = _state(family, rename, PREFIXES[0])
    ranks = write_ranks(tmp_path, state, stages=2, grid=(2, 1), extras=NUMBERS)
    strategy = ["--src_strategy_path_or_dir", str(tmp_path / "strategy")]
    found = _losses(bench, family, ranks, layout, *keys, *strategy)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
