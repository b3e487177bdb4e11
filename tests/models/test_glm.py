"""GLM-4-9B and GLM-4-0414 against transformers: their rotary pairs, norms and gate_up_proj."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.families import model_spec
from models.spec import ModelSpec
from tests.models.test_moe import distance
from tests.models.test_tensor_mapping import loaded
from tests.models.tiny import GLM, dense_spec, gradients_of, oracle, pair, tokens

TOLERANCE = 1e-5
CASES: dict[str, dict[str, Any]] = {
    **GLM,
    "glm tied, no biases": {"tie_word_embeddings": True, "attention_bias": False},
    "glm all heads, all of a head rotated": {"n_kv_heads": 4, "partial_rotary_factor": 1.0},
    "glm one key/value head": {"n_kv_heads": 1, "partial_rotary_factor": 0.25},
    "glm4 yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                         "original_max_position_embeddings": 16},
        "max_position_embeddings": 64,
    },
}  # fmt: skip


def spec_of(name: str) -> ModelSpec:
    return dense_spec(**GLM[name.split()[0]] | CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    own, module = pair(spec_of(name))
    input_ids = tokens(3, 32)
    logits, expected = own(input_ids), module(input_ids, use_cache=False).logits
    assert distance(logits, expected) < TOLERANCE
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    reference = gradients_of(module, own)
    for parameter_name, parameter in own.named_parameters():
        assert distance(parameter.grad, reference.pop(parameter_name)) < TOLERANCE, parameter_name
    assert not reference


@pytest.mark.parametrize("family", GLM)
def test_a_directory_of_transformers_is_loaded(family: str, tmp_path: Path) -> None:
    module = oracle(spec_of(family)).eval()
    module.save_pretrained(tmp_path)
    spec = model_spec({}, json.loads((tmp_path / "config.json").read_text()))
    with torch.no_grad():
        found, expected = loaded(spec, tmp_path)(tokens(2, 24)), module(tokens(2, 24)).logits
    assert distance(found, expected) < TOLERANCE


def test_a_vocabulary_without_the_default_padding_token() -> None:
    small = dense_spec(type="GlmConfig")
    assert small.hf_config["pad_token_id"] is None
    assert dense_spec(type="GlmConfig", vocab_size=151552).hf_config["pad_token_id"] == 151329
