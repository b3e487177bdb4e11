"""Tiny models for tests: the native decoder and the transformers module with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.config_class import class_names
from models.decoder import Decoder
from models.families import DECODERS, ModelConfigError, ModelSpec, model_spec
from models.names import unstacked
from tests.models.zoo import tiny_config

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 80, "num_layers": 3,
    "num_heads": 4, "n_kv_heads": 2,
}  # fmt: skip


IN_TRANSFORMERS = [name for name, own in DECODERS.items() if own.in_transformers]
"""Families with a decoder that transformers has too."""
WITH_CODE_OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    "telechat": {
        "model_type": "telechat", "architectures": ["TelechatForCausalLM"], "hidden_size": 24,
        "n_layer": 2, "n_head": 6, "num_key_value_heads": 2, "ffn_hidden_size": 40,
        "vocab_size": 96, "layer_norm_epsilon": 1e-5, "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_length": 64, "training_seqlen": 64, "base_seqlen": 64, "embed_layernorm": False,
        "flash_attn": True, "logn": True, "tie_word_embeddings": False, "torch_dtype": "float32",
    },
}  # fmt: skip
"""config.json of a small model of each of the others."""
LLAMA = {"type": "LlamaConfig"}
QWEN_MOE = {"type": "Qwen3MoeConfig"}
DEEPSEEK = {"type": "DeepseekV3Config"}

GLM: dict[str, dict[str, Any]] = {
    "glm": {"type": "GlmConfig", "head_dim": 24, "pad_token_id": 3},
    "glm4": {"type": "Glm4Config", "head_dim": 24, "pad_token_id": 3},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "type": "Qwen3MoeConfig", "head_dim": 24, "expert_num": 8, "num_experts_chosen": 3,
        "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1],
    },
    "mixtral": {"type": "MixtralConfig", "expert_num": 4, "num_experts_chosen": 2},
    "deepseek_v3": {
        "type": "DeepseekV3Config", "n_kv_heads": None, "expert_num": 12, "num_experts_chosen": 3,
        "n_group": 4, "topk_group": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "q_lora_rank": 40, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
        "v_head_dim": 20,
    },
    "glm4_moe": {
        "type": "Glm4MoeConfig", "expert_num": 12, "num_experts_chosen": 3, "n_group": 4,
        "topk_group": 2, "moe_intermediate_size": 32, "head_dim": 24, "attention_bias": True,
    },
    "gpt_oss": {
        "type": "GptOssConfig", "expert_num": 8, "num_experts_chosen": 3, "head_dim": 24,
        "sliding_window": 7, "swiglu_limit": 1.5,
    },
}  # fmt: skip
"""A small model with experts of each family."""


def dense_spec(**model_config: Any) -> ModelSpec:
    return model_spec(SIZES | model_config, None)


def experts_spec(family: str, **model_config: Any) -> ModelSpec:
    return dense_spec(**EXPERTS[family] | model_config)


def problems_of(model_config: dict[str, Any], config_json: dict[str, Any] | None = None) -> str:
    with pytest.raises(ModelConfigError) as raised:
        model_spec(model_config, config_json)
    return str(raised.value)


def oracle(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """The transformers module of `spec`, random, with norms and biases not constant."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**spec.hf_config)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in (*module.parameters(), *_corrections(module)):
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return module


def pair(spec: ModelSpec) -> tuple[Decoder, nn.Module]:
    """(native decoder, transformers module) with equal weights, both in training mode."""
    assert spec.decoder is not None
    module = oracle(spec).train()
    own = Decoder(spec.decoder, spec.precision)
    state = module.state_dict() if spec.decoder.experts is None else saved(module)
    if spec.decoder.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    own.load_state_dict(stacked(state, own), strict=True)
    return own, module


def saved(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the directory that transformers saves."""
    from safetensors.torch import load_file

    with TemporaryDirectory() as directory:
        module.save_pretrained(directory)
        return load_file(Path(directory, "model.safetensors"))


def stacked(on_disk: Mapping[str, Tensor], own: Decoder) -> dict[str, Tensor]:
    """Tensors by their names on disk -> by those of `own`: experts of a layer stacked, gate and up
    apart."""
    left, result = dict(on_disk), {}
    for name in [name for name in left if name.endswith(".mlp.gate_up_proj.weight")]:
        gate, up = left.pop(name).chunk(2)
        left[name.replace("gate_up_proj", "gate_proj")] = gate
        left[name.replace("gate_up_proj", "up_proj")] = up
    for name, tensor in own.state_dict().items():
        experts = unstacked(name, tensor.shape, own.config.parameters)
        result[name] = torch.stack([left.pop(e) for e in experts]) if experts else left.pop(name)
    assert not left
    return result


def gradients_of(module: nn.Module, own: Decoder) -> dict[str, Tensor]:
    """The gradients of a transformers module, under the names of `own`."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {name: p.grad for name, p in module.named_parameters()}
    on_disk = revert_weight_conversion(module, found)
    on_disk |= {name: torch.zeros(()) for name, _ in own.named_buffers()}
    return {k: v for k, v in stacked(on_disk, own).items() if k in dict(own.named_parameters())}


def _corrections(module: nn.Module) -> list[Tensor]:
    return [b for name, b in module.named_buffers() if name.endswith("e_score_correction_bias")]


def tokens(rows: int, length: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def module_spec(family: str, **model_config: Any) -> ModelSpec:
    """A tiny spec of a family that runs through its transformers module."""
    return model_spec({"type": class_names()[family], **tiny_config(family, **model_config)}, None)
