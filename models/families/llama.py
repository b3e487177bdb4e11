"""Llama and Mistral: the plain dense decoder."""

from __future__ import annotations

from models.families.family import COMMON, DENSE, Family, same_window

_COMMON = COMMON | {"bos_token_id": 1, "eos_token_id": 2, "head_dim": None, "vocab_size": 32000}

LLAMA = Family(
    config_class="LlamaConfig",
    architecture="LlamaForCausalLM",
    defaults=_COMMON | {
        "intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048,
        "attention_bias": False, "mlp_bias": False,
    },
    parameters=DENSE,
    output_bias=True,
    options=lambda config: {"mlp_bias": bool(config["mlp_bias"])},
)  # fmt: skip

MISTRAL = Family(
    config_class="MistralConfig",
    architecture="MistralForCausalLM",
    defaults=_COMMON | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    parameters=DENSE,
    qkv_bias=False,
    windows=same_window,
)  # fmt: skip
