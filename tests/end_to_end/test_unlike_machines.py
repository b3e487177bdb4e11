"""Machines whose own files differ: an error on both, where ranks would wait or compute apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.test_machines import Machines, assert_ended, machines
from tests.machines import NODES, Job

__all__ = ["machines"]


def other_seed(folder: Path) -> str:
    (yaml,) = folder.glob("*.yaml")
    yaml.write_text(yaml.read_text().replace("seed: 7", "seed: 8"))
    return "seed: 8 on rank 2, 7 on rank 0"


def no_weights(folder: Path) -> str:
    shutil.move(folder / "m/model.safetensors", folder)
    return "weights: none on rank 2, found on rank 0"


def other_weights(folder: Path) -> str:
    path = folder / "m/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    return "weights in m: "


def other_model(folder: Path) -> str:
    path = folder / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    return "config.json: rms_norm_eps: 0.1 on rank 2, "


def other_prompts(folder: Path) -> str:
    (folder / "prompts.txt").write_text("another\n")
    return "--predict_data: ['another'] on rank 2, ['a prompt', 'a second'] on rank 0"


@pytest.mark.parametrize(
    ("spoil", "mode"),
    [
        (no_weights, "train"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (
            (other_seed, "train"), (other_weights, "train"), (other_model, "train"),
            (other_prompts, "predict"), (other_weights, "predict"))),
    ],
)  # fmt: skip
def test_files_that_differ_end_both(machines: Machines, spoil: Any, mode: str) -> None:
    write_model(machines)
    (name,) = {
        workshop.yaml(
            seed=7, pretrained_model_dir="m", output_dir="out", context={"device_target": "CPU"},
            parallel_config={"data_parallel": 2, "model_parallel": 2}, model=None,
            runner_config={"max_steps": 1, "batch_size": 2}, callbacks=[],
        )
        for workshop in machines.workshops.values()
    }  # fmt: skip
    reason = spoil(machines.folder / "b")
    arguments = ["--config", name, "--run_mode", mode]
    prompts = ["--predict_data", "prompts.txt"] if mode == "predict" else []
    ended = Job(machines.folder, [*arguments, *prompts]).end()
    assert_ended(ended, 2, reason, printed_on=(0, 2))


def write_model(machines: Machines) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    for node in NODES:
        folder = machines.folder / node
        (folder / "prompts.txt").write_text("a prompt\na second\n")
        if node == NODES[0]:
            LlamaForCausalLM(config).save_pretrained(folder / "m")
        else:
            shutil.copytree(machines.folder / NODES[0] / "m", folder / "m")
