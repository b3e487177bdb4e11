"""Runs from weights under names of MindFormers are the runs from their Hugging Face twins: predict,
fine-tune on several ranks, resume with the state of Adam, and the way back."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.tools import convert_weight, unified_safetensors
from launcher.weights.source import open_complete
from tests.mindspore.names import (
    GROUP,
    HERE,
    arrays,
    assert_same,
    config_of,
    native,
    write_ranks,
)
from tests.ranks import run_job

BASE: dict[str, Any] = {
    "seed": 3,
    "pretrained_model_dir": "model",
    "train_dataset": {
        "data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus"},
        "seq_length": 16, "packing": True,
    },
    "runner_config": {"epochs": 1, "batch_size": 4, "max_steps": 3},
    "optimizer": {"type": "AdamW", "eps": 1e-4},
    "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 1e-2, "warmup_steps": 1},
    "context": {"device_target": "CPU"},
}  # fmt: skip


def prepare(folder: Path, family: str) -> None:
    """`model/` with config.json and a tokenizer, and `corpus/`."""
    model, words = folder / "model", config_of(family)["vocab_size"]
    model.mkdir(parents=True)
    shutil.copy(HERE / family / "hf" / "config.json", model)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", pad_token="w0", unk_token="w0"
    ).save_pretrained(model)
    pick = random.Random(5)
    (folder / "corpus").mkdir()
    text = " ".join(f"w{pick.randrange(3, words)}" for _ in range(4000))
    (folder / "corpus" / "text.txt").write_text(text)


def run(folder: Path, mode: str, output: str, world_size: int = 1, **changes: Any) -> Path:
    """Run a job that succeeds. Returns its output folder."""
    content = {**BASE, "output_dir": output, **changes}
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(content))
    words = ["--config", f"{output}.yaml", "--run_mode", mode]
    result = run_job(words, folder, world_size)
    assert result.code == 0, result.stderr
    return folder / output


def losses(output: Path) -> list[float]:
    """Training loss of each step."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("family", "form"),
    [("qwen2_5", "legacy_concat"), ("deepseek_v3", "legacy"), ("mixtral", "legacy_gmm")],
)
def test_predict(family: str, form: str, tmp_path: Path) -> None:
    prepare(tmp_path, family)
    found = []
    for weights in ("hf", form):
        output = run(
            tmp_path, "predict", weights, load_checkpoint=str(HERE / family / weights),
            input_data="w5 w9 w33 w12", generation_config={"do_sample": False, "max_new_tokens": 8},
        )  # fmt: skip
        found.append((output / "text_generation_result.txt").read_text())
    assert found[0] == found[1]


LAYOUTS = {
    "dp 2 x tp 2": {"data_parallel": 2, "model_parallel": 2},
    "pp 2": {"pipeline_stage": 2, "micro_batch_num": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fine_tuning_on_several_ranks(layout: str, tmp_path: Path) -> None:
    prepare(tmp_path, "qwen2_5")
    tensors = native(arrays(open_complete(HERE / "qwen2_5" / "legacy_concat")))
    write_ranks(tmp_path / "saved", tensors, grid=(2, 1), stages=2, deduplicated=True)
    weights = {"hf": str(HERE / "qwen2_5" / "hf"), "ranks": "saved/ranks"}
    world_size = 4 if "tp" in layout else 2
    found = [
        losses(run(tmp_path, "finetune", name, world_size, load_checkpoint=path,
                   parallel_config=LAYOUTS[layout]))
        for name, path in weights.items()
    ]  # fmt: skip
    assert len(found[0]) == 3
    assert found[0] == found[1]


def test_resume_with_the_state_of_adam(tmp_path: Path) -> None:
    prepare(tmp_path, "qwen3_state")
    stored = HERE / "qwen3_state" / "mcore_train_state"
    source = open_complete(stored)
    shutil.copytree(stored, tmp_path / "single" / "rank_0")
    extras = {"step_num": np.array(7), "global_step": np.array([7], np.int32),
              "global_batch_size": np.array(8), "epoch_num": np.array(7)}  # fmt: skip
    write_ranks(tmp_path / "cut", native(arrays(source)), grid=(2, 2), extras=extras)
    found = []
    for name, path in (("one", "single"), ("four", "cut/ranks")):
        output = run(
            tmp_path, "train", name, load_checkpoint=path, resume_training=True, **GROUP,
            runner_config={"epochs": 2, "batch_size": 8, "max_steps": 9},
        )  # fmt: skip
        found.append(losses(output))
    assert found[0] == found[1]
    assert len(found[0]) == 2
    _and_back(tmp_path, tmp_path / "one")


def _and_back(folder: Path, output: Path) -> None:
    """A save of the run becomes complete weights of MindFormers, and they what was saved."""
    there, back = folder / "mindformers", folder / "again"
    save = ["--mindspore_ckpt_dir", str(output / "checkpoint"), "--file_suffix", "1_9"]
    form = ["--output_dir", str(there), "--format", "mindspore"]
    assert unified_safetensors.main([*save, *form]) == 0
    assert "adam_v.decoder.layers.0.self_attention.linear_qkv.weight" in (
        json.loads((there / "param_name_map.json").read_text())["weight_map"])  # fmt: skip
    numbers = open_complete(there).extras
    assert numbers.keys() >= {"step_num", "global_step", "epoch_num", "loss_scale"}
    words = ["--model", "qwen3", "--reversed", "--input_path", str(there)]
    assert convert_weight.main([*words, "--output_path", str(back)]) == 0
    assert unified_safetensors.main([*save, "--output_dir", str(folder / "merged")]) == 0
    assert_same(arrays(open_complete(back)), arrays(open_complete(folder / "merged")))
