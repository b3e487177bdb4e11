"""Tiny models for tests: our decoder and the transformers module of the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.decoder import Decoder
from models.families import TRANSFORMERS_MODULES, ModelSpec, model_spec

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 80, "num_layers": 3,
    "num_heads": 4, "n_kv_heads": 2,
}  # fmt: skip


def dense_spec(**model_config: Any) -> ModelSpec:
    return model_spec(SIZES | model_config, None)


def oracle(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """The transformers module of `spec`, random, norms and biases off their initial constants."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**spec.hf_config)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return module


def pair(spec: ModelSpec) -> tuple[Decoder, nn.Module]:
    """(our decoder, transformers module) with equal weights, both in training mode."""
    assert spec.decoder is not None
    module = oracle(spec).train()
    own = Decoder(spec.decoder, spec.precision)
    state = module.state_dict()
    if spec.decoder.tie_word_embeddings:
        del state["lm_head.weight"]
    own.load_state_dict(state, strict=True)
    return own, module


def tokens(rows: int, length: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def module_spec(family: str, **model_config: Any) -> ModelSpec:
    """A tiny spec of a family that runs through its transformers module."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[family]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    wanted = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "sliding_window": 6, "window_size": 6, "rotary_dim": 4,
        "word_embed_proj_dim": 32, "query_pre_attn_scalar": 8, "n_inner": 48, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "attention_types": [[["global", "local"], 1]],
    } | model_config  # fmt: skip
    sizes = {key: value for key, value in wanted.items() if key in known}
    return model_spec({"type": TRANSFORMERS_MODULES[family], **sizes}, None)
