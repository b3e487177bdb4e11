"""pet_config as MindFormers writes it: names of its layers, frozen parameters, defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.resolve import resolve
from launcher.config.schema import Config

HEAD = "model:\n  model_config:\n    type: {kind}\n    pet_config:\n"
ROUTED = r".*\.experts\..*"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "      pet_type: lora\n      lora_rank: 16\n      lora_alpha: 16\n"
    "      lora_dropout: 0.05\n      target_modules: '.*wq|.*wk|.*wv|.*wo'\n": (
        "LlamaConfig",
        {"lora_dropout": 0.05, "lora_rank": 16, "exclude_modules": [],
         "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "      pet_type: lora\n      lora_a_init: normal\n      lora_b_init: zeros\n"
    "      target_modules: '.*word_embeddings|.*linear_qkv|.*linear_proj|.*linear_fc1|"
    ".*linear_fc2'\n      freeze_include: ['*']\n      freeze_exclude: ['*lora*']\n": (
        "Qwen3Config",
        {"lora_dropout": 0.01, "exclude_modules": ROUTED,
         "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                            "down_proj"]},
    ),
    "      target_modules: '.*w1|.*w2|.*w3|.*w_qkv'\n": (
        "Qwen2Config",
        {"target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj", "k_proj", "v_proj"]},
    ),
    "      target_modules: [w1, w2]\n": (
        "MixtralConfig", {"target_modules": ["w1", "w2"], "lora_dropout": 0.0}
    ),
    "      target_modules: '.*(q|v)_proj'\n": (
        "Qwen3Config", {"target_modules": ".*(q|v)_proj", "lora_dropout": 0.0}
    ),
}  # fmt: skip


def read(text: str, folder: Path) -> tuple[Config, list[str]]:
    file = folder / "x.yaml"
    file.write_text(text)
    found = resolve(str(file), "finetune", {}, ())
    return found.config, [str(problem) for problem in found.problems]


@pytest.mark.parametrize("lines", CASES)
def test_what_mindformers_writes(lines: str, tmp_path: Path) -> None:
    kind, expected = CASES[lines]
    config, problems = read(HEAD.format(kind=kind) + lines, tmp_path)
    assert problems == []
    assert config.pet_config.pet_type == "lora"
    for key, value in expected.items():
        assert getattr(config.pet_config, key) == value, key


def test_the_eager_style(tmp_path: Path) -> None:
    config, problems = read("lora_config: {lora_rank: 4, target_modules: '.*linear_q'}\n", tmp_path)
    assert problems == []
    assert config.pet_config.lora_rank == 4
    assert config.pet_config.target_modules == ["q_proj"]
