"""Configurations of models that are refused, and the messages."""

from __future__ import annotations

from typing import Any

import pytest

from models.families import DECODERS, ModelConfigError, model_spec
from tests.models.tiny import DEEPSEEK, LLAMA, QWEN_MOE, problems_of

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no type": (
        {},
        "model.model_config.type is missing. Set it, for example to Qwen3Config, or set "
        "pretrained_model_dir.",
    ),
    "typo in type": (
        {"type": "Qwen3Confg"},
        "model.model_config.type = Qwen3Confg: unknown model type. did you mean `Qwen3Config`?",
    ),
    "mixture of experts": (
        {"type": "DbrxConfig"},
        "type = DbrxConfig needs another mixture of experts: not built yet. "
        f"Supported: {', '.join(DECODERS)}, and those of transformers in docs/models.md",
    ),
    "indexer": ({"type": "DeepseekV32Config"}, "needs an attention indexer, which is trained"),
    "multimodal": ({"model_type": "qwen2_vl"}, "needs multimodal models: not built yet"),
    "recurrent": ({"type": "RwkvConfig"}, "needs recurrent models: not built yet"),
    "unknown key": (
        LLAMA | {"hidden_siz": 64},
        "model.model_config.hidden_siz = 64: unknown key for this "
        "model. did you mean `hidden_size`?",
    ),
    "key of another family": (LLAMA | {"max_window_layers": 2}, "unknown key for this model"),
    "unknown dtype": (
        LLAMA | {"compute_dtype": "bfloat61"},
        "unknown dtype. did you mean `bfloat16`?",
    ),
    "hidden by heads": (
        LLAMA | {"hidden_size": 100, "num_heads": 8},
        "model.model_config.hidden_size = 100: cannot be divided by 8 attention heads. "
        "Nearest: 96 or 104.",
    ),
    "key/value heads": (
        LLAMA | {"hidden_size": 96, "num_heads": 12, "n_kv_heads": 5},
        "model.model_config.n_kv_heads = 5: 12 attention heads cannot be divided over 5 "
        "KV heads. Nearest: 4 or 6.",
    ),
    "default does not fit": (
        {"type": "MistralConfig", "num_heads": 4, "hidden_size": 64},
        "num_key_value_heads = 8 (the default of mistral): 4 attention heads cannot be "
        "divided over 8 KV heads. Nearest: 4.",
    ),
    "odd head": (
        {"type": "Qwen3Config", "head_dim": 15},
        "model.model_config.head_dim = 15: rotary embeddings "
        "need an even head size. Nearest: 14 or 16.",
    ),
    "odd derived head": (
        LLAMA | {"hidden_size": 60, "num_heads": 4, "n_kv_heads": 4},
        "4 attention heads of 15: rotary embeddings need an even head size. Nearest: 56 or 64.",
    ),
    "negative": (
        LLAMA | {"num_layers": -2},
        "model.model_config.num_layers = -2: must be an integer of at least 1.",
    ),
    "not a number": (
        LLAMA | {"vocab_size": "32k"},
        "model.model_config.vocab_size = '32k': must be an integer",
    ),
    "flag": (LLAMA | {"tie_word_embeddings": "maybe"}, "must be True or False"),
    "dropout": (
        LLAMA | {"attention_dropout": 1.0},
        "must be at least 0 and less than 1",
    ),
    "activation": (LLAMA | {"hidden_act": "sillu"}, "unknown activation. did you mean `silu`?"),
    "rope type": (
        LLAMA | {"rope_scaling": {"type": "lnear", "factor": 2}},
        "model_config.rope_scaling: rope_type = lnear: unknown rope_type. did you mean `linear`?",
    ),
    "no map": (
        LLAMA | {"rope_scaling": "linear"},
        "rope_scaling = linear: must be a map such as {rope_type: linear, factor: 2.0}",
    ),
    "number of layer types": (
        {"type": "Qwen3Config", "num_layers": 3, "layer_types": ["full_attention"] * 2},
        "has 2 entries for 3 layers",
    ),
    "longrope": (
        LLAMA | {"rope_scaling": {"type": "longrope"}},
        "rope_type = longrope: not built yet",
    ),
    "no factor": (
        LLAMA | {"rope_scaling": {"type": "linear"}},
        "factor = None: rope_type linear needs a number",
    ),
    "small factor": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "must be at least 1",
    ),
    "theta": (LLAMA | {"theta": -1}, "model.model_config.theta: rope_theta = -1"),
    "experts": (
        LLAMA | {"expert_num": 8},
        "model.model_config.expert_num needs mixture of experts: LlamaForCausalLM has no experts. "
        "Set type: Qwen3MoeConfig, MixtralConfig, DeepseekV3Config, Glm4MoeConfig, GptOss",
    ),
    "too many chosen": (
        QWEN_MOE | {"expert_num": 4, "num_experts_chosen": 5},
        "model.model_config.num_experts_chosen = 5: must be at most the number of experts, 4. "
        "Nearest: 4.",
    ),
    "no experts at all": (
        QWEN_MOE | {"num_experts": 0},
        "num_experts = 0: must be an integer of at least 1",
    ),
    "dense layers": (
        QWEN_MOE | {"mlp_only_layers": 3},
        "mlp_only_layers = 3: must be a list of layer numbers, from 0.",
    ),
    "jitter": (
        {"type": "MixtralConfig", "router_jitter_noise": 0.1},
        "router_jitter_noise = 0.1: router noise is not built yet. Nearest: 0.0.",
    ),
    "key of another family's experts": (
        {"type": "MixtralConfig", "moe_intermediate_size": 8},
        "moe_intermediate_size = 8: unknown key for this model",
    ),
    "balance": (
        QWEN_MOE | {"router_aux_loss_coef": -1},
        "router_aux_loss_coef = -1: must be a number of at least 0",
    ),
    "balance without a loss": (
        DEEPSEEK | {"output_router_logits": True},
        "output_router_logits = True: this family has no balance loss. Nearest: False.",
    ),
    "groups": (
        DEEPSEEK | {"n_routed_experts": 20},
        "n_routed_experts = 20: cannot be divided into 8 groups of at least 2 experts. "
        "Nearest: 16 or 24.",
    ),
    "lonely experts": (
        DEEPSEEK | {"n_routed_experts": 8},
        "n_routed_experts = 8: cannot be divided into 8 groups of at least 2 experts. "
        "Nearest: 16 or 24.",
    ),
    "groups kept": (
        DEEPSEEK | {"moe_router_group_topk": 9},
        "model.model_config.moe_router_group_topk = 9: there are only 8 groups. Nearest: 8.",
    ),
    "more than the groups have": (
        DEEPSEEK | {"n_routed_experts": 16, "topk_group": 2, "num_experts_per_tok": 6},
        "num_experts_per_tok = 6: there are fewer experts in 2 groups of 2. Nearest: 4.",
    ),
    "odd rotated part": (
        DEEPSEEK | {"qk_rope_head_dim": 63},
        "qk_rope_head_dim = 63: rotary embeddings need an even head size. Nearest: 62 or 64.",
    ),
    "shared keys": (
        DEEPSEEK | {"num_heads": 4, "n_kv_heads": 2},
        "n_kv_heads = 2: must equal the attention heads, 4, in latent attention. Nearest: 4. "
        "Or remove it.",
    ),
    "size of a head": (DEEPSEEK | {"head_dim": 64}, "head_dim = 64: unknown key for this model"),
    "other router": (
        DEEPSEEK | {"scoring_func": "softmax"},
        "scoring_func = 'softmax': this family supports only one value. Nearest: sigmoid.",
    ),
    "further tokens": (
        DEEPSEEK | {"num_nextn_predict_layers": 1},
        "num_nextn_predict_layers needs multi-token prediction: not built yet",
    ),
    "two spellings": (
        LLAMA | {"num_layers": 2, "num_hidden_layers": 3},
        "num_hidden_layers = 3: conflicts with model.model_config.num_layers = 2, "
        "the same key. Keep one of them.",
    ),
    "query bias": (LLAMA | {"qkv_has_bias": True}, "Nearest: type: Qwen2Config"),
    "too long": (
        LLAMA | {"seq_length": 4096, "max_position_embeddings": 2048},
        "model.model_config.seq_length = 4096: the model has fewer positions "
        "(model.model_config.max_position_embeddings = 2048). Nearest: 2048.",
    ),
    "window layers": (
        {"type": "Qwen2Config", "layer_types": ["sliding_attention"] * 32},
        "sliding_attention needs use_sliding_window: True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model_config, text = REFUSED[name]
    assert text in problems_of(model_config)


def test_problems_of_files_name_the_file() -> None:
    base = {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 8}
    assert problems_of({}, base).startswith(
        "config.json: hidden_size = 100: cannot be divided by 8"
    )
    assert "config.json: model_type = dbrx needs another mixture" in problems_of(
        {}, {"model_type": "dbrx"}
    )
    groups = {"model_type": "deepseek_v3", "num_local_experts": 20}
    assert "config.json: n_routed_experts = 20: cannot be divided into 8" in problems_of({}, groups)
    other = problems_of({"type": "Qwen3Config"}, {"model_type": "llama"})
    assert "config.json of pretrained_model_dir has model_type llama" in other
    vision = {"model_type": "some_new_vl", "text_config": {"model_type": "llama"}}
    assert "needs multimodal models" in problems_of({}, vision)


MXFP4 = {"quant_method": "mxfp4"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3", "dots1"])
def test_fp8_weights_are_dequantized(family: str) -> None:
    spec = model_spec({}, {"model_type": family, "quantization_config": FP8})
    assert "quantization_config" not in spec.hf_config
    assert (
        "config.json: quantization_config: FP8 weights are dequantized when they are read"
    ) in spec.notes


def test_mxfp4_weights_are_dequantized_for_a_family_that_supports_them() -> None:
    spec = model_spec({}, {"model_type": "gpt_oss", "quantization_config": MXFP4})
    assert "quantization_config" not in spec.hf_config
    assert "config.json: quantization_config: MXFP4 weights are dequantized when they are read" in (
        spec.notes
    )


@pytest.mark.parametrize(
    "other",
    [{"quant_method": "gptq", "bits": 4}, FP8 | {"weight_block_size": None}, FP8 |
     {"weight_block_size": [128, 0]}, MXFP4, "fp8"],
)  # fmt: skip
def test_other_quantization_is_refused(other: Any) -> None:
    for family in ("deepseek_v3", "phi3"):
        assert (
            "config.json: quantization_config needs quantized weights: not built yet. "
            "Use FP8 weights with a scale for each block (quant_method fp8, weight_block_size "
            "[128, 128]), or convert the weights to bfloat16"
        ) in problems_of({}, {"model_type": family, "quantization_config": other})


def test_all_problems_are_reported_together_with_their_keys() -> None:
    with pytest.raises(ModelConfigError) as raised:
        model_spec(LLAMA | {"num_layer": 2, "compute_dtype": "fp8", "num_heads": 0}, None)
    assert [p.key for p in raised.value.model_problems] == [
        "num_layer", "compute_dtype", "num_heads",
    ]  # fmt: skip


def test_types_that_transformers_does_not_have() -> None:
    text = problems_of({"num_layers": 2}, {"model_type": "gpt_neoxx", "hidden_size": 8})
    assert text == (
        "config.json: model_type = gpt_neoxx: transformers has no such model type. "
        "did you mean `gpt_neox`?"
    )
