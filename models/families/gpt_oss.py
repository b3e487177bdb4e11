"""gpt-oss: attention sinks, a sliding window in every second layer, experts with biases.

In files and in the decoder a stack of experts is one tensor, with gate and up interleaved in the
last dim: tensor parallelism shards between pairs.
"""

from __future__ import annotations

from models.checks import LAYER_TYPES, is_number
from models.families.family import (
    ATTENTION,
    BALANCE,
    COMMON,
    ENDS,
    NORMS,
    REPLICATED,
    Add,
    Config,
    Family,
    experts_of,
    windows_by_type,
)
from models.spec import ClampedGate, Rule

_ATTENTION = ATTENTION | {"self_attn.sinks": Rule(tp_dim=0, drawn=True)}
_EXPERTS = {
    "mlp.router.weight": REPLICATED,
    "mlp.router.bias": Rule(drawn=True),
    "mlp.experts.gate_up_proj": Rule(tp_dim=2, expert=True),
    "mlp.experts.gate_up_proj_bias": Rule(tp_dim=1, expert=True),
    "mlp.experts.down_proj": Rule(tp_dim=1, expert=True),
    "mlp.experts.down_proj_bias": Rule(added_once=True, expert=True),
}


def _windows(config: Config) -> tuple[int | None, ...]:
    layers = range(config["num_hidden_layers"])
    return windows_by_type(config, [LAYER_TYPES[(layer + 1) % 2] for layer in layers])


def _check(config: Config, add: Add) -> None:
    for key in ("swiglu_alpha", "swiglu_limit"):
        if not is_number(config[key]) or config[key] <= 0:
            add(key, "must be a number above 0", "", "")


GPT_OSS = Family(
    config_class="GptOssConfig",
    architecture="GptOssForCausalLM",
    defaults=COMMON | BALANCE | {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": True,
        "sliding_window": 128, "layer_types": None, "num_local_experts": 128,
        "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        "bos_token_id": None, "eos_token_id": None,
    },
    parameters=ENDS | NORMS | _ATTENTION | _EXPERTS,
    output_bias=True,
    windows=_windows,
    rope={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096, "rope_theta": 150000.0,
    },
    expert_count="num_local_experts",
    experts=lambda config: experts_of(
        config, config["num_local_experts"], router_name="router", router_bias=True,
        clamped=ClampedGate(float(config["swiglu_alpha"]), float(config["swiglu_limit"])),
    ),
    options=lambda config: {"attention_sinks": True},
    check=_check,
    reads_mxfp4=True,
)  # fmt: skip
