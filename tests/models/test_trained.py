"""Which parameters an optimizer for matrices updates, and which have weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.build import build_model
from models.families import model_spec
from models.trained import trained_parameters

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "Slipway's decoder": (
        {"type": "Qwen3MoeConfig", **SIZES, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 8, "attention_bias": True},
        {"self_attn.q_proj.weight", "mlp.gate.weight", "mlp.experts.down_proj"},
        {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
         "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.k_norm.weight"},
    ),
    "a module of transformers": (
        {"type": "GPT2Config", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
        {"attn.c_attn.weight", "mlp.c_proj.weight"},
        {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight",
         "transformer.h.1.attn.c_attn.bias"},
    ),
}  # fmt: skip
"""Model, matrices of every layer, and parameters that are not matrices."""


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_those_of_the_layers(name: str) -> None:
    config, matrices, others = CASES[name]
    model = build_model(model_spec(config, None), dtype=torch.float32)
    found = trained_parameters(model)
    prefix = "model.layers" if "Qwen" in config["type"] else "transformer.h"
    expected = {f"{prefix}.{layer}.{leaf}" for layer in range(2) for leaf in matrices}
    by_file = {name.removeprefix("wrapped."): fact for name, fact in found.items()}
    assert expected <= {name for name, fact in by_file.items() if fact.is_matrix}
    assert not any(by_file[name].is_matrix for name in others)
    decaying = {name for name, fact in by_file.items() if fact.decays}
    assert expected < decaying
    assert not any(name.endswith("bias") or "norm" in name or "ln_" in name for name in decaying)


def test_a_frozen_parameter_is_not_trained() -> None:
    config, _, _ = CASES["Slipway's decoder"]
    model = build_model(model_spec(config, None), dtype=torch.float32)
    model.get_parameter("lm_head.weight").requires_grad_(False)
    assert "lm_head.weight" not in trained_parameters(model)
    assert trained_parameters(model).keys() < dict(model.named_parameters()).keys()
