"""The maximum length of a row: learned positions by computing, rope scaling by its values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.builders.open_dataset import seq_length
from launcher.config.schema import DatasetSection
from launcher.predict.generate import positions_of
from models.build import build_model
from models.families import ModelConfigError, model_spec
from models.module_table import LEARNED_POSITIONS
from models.positions import position_limit, row_length
from tests.models.test_sweep import saved_module
from tests.models.tiny import dense_spec, tokens

KEYS = {
    "codegen": "n_positions", "ctrl": "n_positions", "gpt2": "n_positions",
    "gpt-sw3": "n_positions", "gpt_bigcode": "n_positions", "gptj": "n_positions",
    "openai-gpt": "n_positions", "mpt": "max_seq_len",
}  # fmt: skip
"""Families with another name for max_position_embeddings."""


@pytest.mark.parametrize("family", LEARNED_POSITIONS)
def test_learned_positions_limit_a_row(family: str, tmp_path: Path) -> None:
    module = saved_module(family, tmp_path).eval()
    config = json.loads((tmp_path / "config.json").read_text())
    limit = position_limit(family, config)
    assert limit is not None
    assert limit.key == KEYS.get(family, "max_position_embeddings")
    assert limit.longest_row is not None
    assert row_length(family, config) == limit.longest_row == limit.unscaled_row
    with torch.no_grad():
        module(tokens(1, limit.longest_row), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            module(tokens(1, limit.longest_row + 1), use_cache=False)


LIMITS: dict[str, tuple[str, dict[str, Any], int | None, int]] = {
    "the default of the class": ("gpt2", {}, 1024, 1024),
    "another name for it": ("gpt2", {"max_position_embeddings": 77}, 77, 77),
    "entries below the padding token's": (
        "roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512, 512,
    ),
    "the padding token of the class": ("xlm-roberta", {"max_position_embeddings": 514}, 512, 512),
    "no positions at all": ("bloom", {}, None, 2048),
    "rotary": ("phi", {"max_position_embeddings": 1024}, 1024, 1024),
    "many": ("phi", {"max_position_embeddings": 8192}, 8192, 2048),
    "vicuna-16k": (
        "llama",
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
        16384, 2048,
    ),
    "linear, in the current spelling": (
        "phi",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        128, 64,
    ),
    "yarn as Qwen2.5 advises it": (
        "qwen2",
        {"max_position_embeddings": 32768, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        }}, 131072, 2048,
    ),
    "llama3, already counted": (
        "llama",
        {"max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
        }}, 131072, 2048,
    ),
    "dynamic": (
        "llama", {"max_position_embeddings": 64, "rope_scaling": {
            "rope_type": "dynamic", "factor": 2.0,
        }}, None, 64,
    ),
    "by layer type": (
        "gemma3_text", {"max_position_embeddings": 64, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_type": "default"},
        }}, 512, 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str) -> None:
    family, config, longest, usual = LIMITS[name]
    limit = position_limit(family, config)
    assert (limit and limit.longest_row) == longest
    assert row_length(family, config) == usual


def test_a_written_row_of_a_scaled_model() -> None:
    config = {"model_type": "llama", "max_position_embeddings": 64,
              "rope_scaling": {"type": "linear", "factor": 4.0}}  # fmt: skip
    assert model_spec({"seq_length": 256}, config).seq_length == 256
    with pytest.raises(ModelConfigError, match=r"seq_length = 257: .*Nearest: 256"):
        model_spec({"seq_length": 257}, config)
    unscaled = {"rope_scaling": None, "seq_length": 65}
    with pytest.raises(ModelConfigError, match=r"seq_length = 65: .*Nearest: 64"):
        model_spec(unscaled, config)


def test_default_length_of_rows() -> None:
    config = {"model_type": "gpt2", "n_positions": 64}
    for written, section, expected in (
        ({}, None, 64),
        ({"seq_length": 32}, None, 32),
        ({}, 16, 16),
    ):
        job = SimpleNamespace(spec=model_spec(written, config))
        assert seq_length(job, DatasetSection(seq_length=section)) == expected  # type: ignore[arg-type]


def test_prediction_ends_there_too() -> None:
    scaled = {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}
    decoder = build_model(dense_spec(type="LlamaConfig", **scaled), dtype=torch.float32)
    assert positions_of(decoder) == 128
    for config, longest in (
        ({"model_type": "gpt2", "n_positions": 48, "n_embd": 8, "n_layer": 1, "n_head": 2}, 48),
        ({"model_type": "mpt", "max_seq_len": 32, "d_model": 8, "n_layers": 1, "n_heads": 2}, 32),
        ({"model_type": "bloom", "hidden_size": 8, "n_layer": 1, "n_head": 2}, None),
    ):
        model = build_model(model_spec({}, config), dtype=torch.float32)
        assert positions_of(model) == longest
