"""GLM-4-9B and GLM-4-0414: half of each head rotated, in neighbouring pairs; the latter also with
norms of the outputs of attention and MLP.

In files gate and up of the MLP are one tensor, first the rows of gate; the decoder has two, which
tensor parallelism can shard. `launcher.weights.joined` has the way between.
"""

from __future__ import annotations

from typing import Any

from models.families.family import BETWEEN, COMMON, DENSE, Config, Family

JOINED = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
"""Module in files to the modules of the decoder that its rows belong to."""

_DEFAULTS: dict[str, Any] = COMMON | {
    "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7, "attention_bias": True, "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338], "bos_token_id": None,
}  # fmt: skip


def _windows(config: Config) -> tuple[int | None, ...]:
    """None in any layer. A small vocabulary lacks the default padding token, with which
    transformers could not build the model."""
    if config["pad_token_id"] == _DEFAULTS["pad_token_id"] >= config["vocab_size"]:
        config["pad_token_id"] = None
    return (None,) * config["num_hidden_layers"]


GLM = Family(
    config_class="GlmConfig",
    architecture="GlmForCausalLM",
    defaults=_DEFAULTS,
    parameters=DENSE,
    partial_rotary_factor=0.5,
    windows=_windows,
    options=lambda config: {"rope_interleave": True},
)

GLM4 = Family(
    config_class="Glm4Config",
    architecture="Glm4ForCausalLM",
    defaults=_DEFAULTS,
    parameters=DENSE
    | {"post_self_attn_layernorm.weight": BETWEEN, "post_mlp_layernorm.weight": BETWEEN},
    partial_rotary_factor=0.5,
    windows=_windows,
    options=lambda config: {"rope_interleave": True, "output_norms": True},
)
