"""Models in MindFormers' YAML are those of config.json of their Hugging Face twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.extensions import TRANSLATIONS, installed
from models.families import DECODERS, model_spec
from tests.mindspore.yaml_models import core, golden, legacy, resolved, spec_of, written

SIZES = "seq_length: 64, hidden_size: 32, vocab_size: 96, init_method_std: 0.02, offset: 0"
LEGACY = (
    f"type: LlamaConfig, batch_size: 1, {SIZES}, num_layers: 2, num_heads: 4, rms_norm_eps: 1.0e-6,"
    " intermediate_size: 40, theta: 10000.0, use_past: True, qkv_concat: True, do_sample: False,"
    ' checkpoint_name_or_path: "", max_decode_length: 32, use_flash_attention: True'
)
PLAIN = 'extend_method: "None", scaling_factor: 1.0'
CORE = (
    "vocab_size: 96, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4,"
    " intermediate_size: 40, num_query_groups: 2, kv_channels: 16, rms_norm_eps: 1.e-6,"
    " hidden_act: swiglu, gated_linear_unit: True, add_bias_linear: False, normalization: RMSNorm,"
    " untie_embeddings_and_output_weights: True, position_embedding_type: rope, rotary_base: 10000,"
    " max_position_embeddings: 64, init_method_std: 0.02, qk_layernorm: True, hidden_dropout: 0.0,"
    " attention_dropout: 0.0, bos_token_id: 1, eos_token_id: 2, pad_token_id: 0, seq_length: 32"
)
LATENT = (
    "q_lora_rank: 20, kv_lora_rank: 16, qk_nope_head_dim: 12, qk_rope_head_dim: 8, v_head_dim: 10"
)

TWINS: dict[str, tuple[str, str]] = {
    "llama2": ("llama2", legacy(f"{LEGACY}, {PLAIN}, multiple_of: 256")),
    "llama3_1": (
        "llama3_1",
        legacy(
            f"{LEGACY}, n_kv_heads: 2, extend_method: LLAMA3, scaling_factor: {{factor: 8.0, "
            "low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 32}"
        ).replace("theta: 10000.0", "theta: 500000"),
    ),
    "qwen2_5": (
        "qwen2_5",
        legacy(
            f"{LEGACY}, {PLAIN}, n_kv_heads: 2, qkv_has_bias: True, emb_dropout_prob: 0.0, "
            "rotary_emb_base: 1000000, rotary_pct: 1.0, max_position_embedding: 64"
        ),
    ),
    "mixtral": (
        "mixtral",
        legacy(
            f"{LEGACY}, n_kv_heads: 2".replace("1.0e-6", "1.0e-5")
            .replace("intermediate_size: 40", "intermediate_size: 24")
            .replace("10000.0", "1000000.0"),
            moe="expert_num: 8, num_experts_chosen: 2, capacity_factor: 1.1, aux_loss_factor: 0.05,"
            " routing_policy: TopkRouterV2, enable_sdrop: True, topk_bias_update_rate: 0.001,"
            " balance_via_topk_bias: False",
        ),
    ),
    "qwen3": ("qwen3", core(f"architectures: [Qwen3ForCausalLM], {CORE}")),
    "qwen3_moe": (
        "qwen3_moe",
        core(
            f"model_type: qwen3_moe, architectures: Qwen3MoeForCausalLM, {CORE}, num_experts: 4,"
            " num_experts_per_tok: 2.0, moe_intermediate_size: 24, norm_topk_prob: True,"
            " moe_router_pre_softmax: True, moe_aux_loss_coeff: 0.001,"
            " moe_router_load_balancing_type: gbs_aux_loss, moe_grouped_gemm: True",
            mode="predict",
        ),
    ),
    "deepseek_v3 legacy": (
        "deepseek_v3",
        legacy(
            f"type: DeepseekV3Config, {SIZES}, num_layers: 3, num_heads: 2, rms_norm_eps: 1.0e-6, "
            f"intermediate_size: 40, {LATENT}, max_position_embeddings: 64, mtp_depth: 1, "
            'scaling_factor: 1.0, extend_method: "None", auto_map: {AutoConfig: a.B}',
            arch="DeepseekV3ForCausalLM",
            moe="expert_num: 4, num_experts_chosen: 2, shared_expert_num: 1.0, n_group: 2, "
            "topk_group: 1, routed_scaling_factor: 2.5, first_k_dense_replace: 1, "
            "moe_intermediate_size: 24, routing_policy: TopkRouterV2",
        ),
    ),
    "deepseek_v3 core": (
        "deepseek_v3",
        core(
            f"model_type: deepseek_v3, {CORE}, {LATENT}, n_routed_experts: 4, "
            "num_experts_per_tok: 2, n_shared_experts: 1, moe_intermediate_size: 24, "
            "moe_shared_expert_intermediate_size: 24, first_k_dense_replace: 1, n_group: 2, "
            "topk_group: 1, multi_latent_attention: True, moe_router_topk_scaling_factor: 2.5, "
            "moe_router_score_function: sigmoid, moe_router_enable_expert_bias: True, "
            "moe_router_bias_update_rate: 0.001, num_nextn_predict_layers: 1, mtp_loss_factor: 0.3",
            mode="predict",
        )
        .replace("num_query_groups: 2, kv_channels: 16, ", "")
        .replace("num_hidden_layers: 2", "num_hidden_layers: 3")
        .replace("num_attention_heads: 4", "num_attention_heads: 2"),
    ),
    "telechat2": (
        "telechat2",
        legacy(
            f"type: TelechatConfig, {SIZES}, num_layers: 2, num_heads: 4, n_kv_heads: 2, "
            "intermediate_size: 40, rms_norm_eps: 1.0e-5, bos_token_id: 1, eos_token_id: 2, "
            "pad_token_id: 3, embed_dropout_prob: 0.0, hidden_dropout_prob: 0.0, "
            "attention_dropout_prob: 0.0, res_dtype: float32, pretrain_seqlen: 8192, "
            "out_proj_has_bias: True, auto_register: telechat_config.TelechatConfig, "
            'extend_method: "None", qkv_concat: False, use_past_shard: False',
            arch="TelechatForCausalLM",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TWINS)
def test_a_model_equals_that_of_its_twin(case: str) -> None:
    name, text = TWINS[case]
    own, twin = spec_of(text), model_spec({}, golden(name))
    assert own.family == twin.family
    assert own.decoder == twin.decoder
    keys = own.hf_config.keys() & twin.hf_config.keys() - {"architectures"}
    assert {k: own.hf_config[k] for k in keys} == {k: twin.hf_config[k] for k in keys}


def test_glm_4_9b_is_glm_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    spec = spec_of(
        legacy(
            "type: ChatGLM2Config, num_layers: 2, padded_vocab_size: 96, hidden_size: 32, "
            "ffn_hidden_size: 40, kv_channels: 8, num_attention_heads: 4, seq_length: 64, "
            "layernorm_epsilon: 1.5625e-07, rope_ratio: 500, rmsnorm: True, hidden_dropout: 0.0, "
            "attention_dropout: 0.0, apply_residual_connection_post_layernorm: False, "
            "post_layer_norm: True, add_bias_linear: False, add_qkv_bias: True, mlp_concat: True, "
            "multi_query_attention: True, multi_query_group_num: 2, pre_seq_len: None, "
            "apply_query_key_layer_scaling: True, fp32_residual_connection: False, "
            "quantization_bit: 0, prefix_projection: False, eos_token_id: [1, 2], pad_token_id: 1, "
            "embedding_size: 1, attention_softmax_in_fp32: True, bias_dropout_fusion: True",
            arch="ChatGLM2ForConditionalGeneration",
            moe="expert_num: 1, capacity_factor: 1.05, aux_loss_factor: 0.05",
        )
    )
    assert spec.family == "glm"
    made = transformers.GlmConfig.from_dict(spec.hf_config)
    assert made.rope_parameters == {
        "rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    assert (made.attention_bias, made.num_key_value_heads, made.head_dim) == (True, 2, 8)
    assert (made.intermediate_size, made.vocab_size, made.rms_norm_eps) == (40, 96, 1.5625e-07)


def test_qwen2_moe_of_a_llama_with_experts_and_biases() -> None:
    text = legacy(
        f"{LEGACY}, n_kv_heads: 2, qkv_has_bias: True",
        moe="expert_num: 4, num_experts_chosen: 2, shared_expert_num: 8.0, norm_topk_prob: False, "
        "use_shared_expert_gating: True, capacity_factor: -1",
    )
    spec = spec_of(text)
    assert spec.family == "qwen2_moe"
    expected = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 320, "norm_topk_prob": False, "vocab_size": 96,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    assert {key: spec.hf_config[key] for key in expected} == expected


def test_experts_are_the_defaults_of_moe_config() -> None:
    experts = "expert_num: 4"
    deepseek = f"type: DeepseekV3Config, {SIZES}, num_layers: 3, num_heads: 2, {LATENT}"
    spec = spec_of(legacy(deepseek, arch="DeepseekV3ForCausalLM", moe=experts))
    found = spec.decoder and spec.decoder.experts
    assert found is not None
    assert (found.groups, found.shared_experts, found.experts_per_token) == (1, 0, 1)
    assert (found.routed_scaling_factor, found.norm_topk_prob) == (1.0, True)


def test_defaults_of_the_older_class() -> None:
    spec = spec_of(legacy("type: LlamaConfig, qkv_has_bias: True, seq_length: 512"))
    assert spec.family == "qwen2"
    expected = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    }  # fmt: skip
    assert {key: spec.hf_config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ("hidden_size: 4096, multiple_of: 256", 11008),
        ("hidden_size: 4096, multiple_of: 1024, ffn_dim_multiplier: 1.3", 14336),
        ("hidden_size: 8192, multiple_of: 256, ffn_dim_multiplier: 1.3", 28672),
        ("hidden_size: 8192, multiple_of: 4096, ffn_dim_multiplier: 1.3, num_heads: 64", 28672),
        ("hidden_size: 5120, num_heads: 40", 13824),
        ("hidden_size: 64, num_heads: 4, multiple_of: 32", 192),
        ("hidden_size: 4096, multiple_of: 1024, intermediate_size: 77", 77),
        ('hidden_size: 4096, multiple_of: 1024, ffn_dim_multiplier: "None"', 11264),
    ],
)
def test_width_of_the_mlp(keys: str, width: int) -> None:
    assert spec_of(legacy(f"type: LlamaConfig, {keys}")).hf_config["intermediate_size"] == width


def test_config_json_is_below_model_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(golden("qwen3")))
    keys = (
        "qk_layernorm: True, hidden_act: fusedswiglu, gated_linear_unit: True, num_layers: 1, "
        "add_bias_linear: False, untie_embeddings_and_output_weights: False, theta: 500000, "
        "params_dtype: float32, compute_dtype: bfloat16, rotary_dtype: float32, offset: [0, 0]"
    )
    spec = spec_of(core(keys, more=f"pretrained_model_dir: {tmp_path}\n"))
    expected = golden("qwen3") | {
        "num_hidden_layers": 1, "tie_word_embeddings": True, "layer_types": ["full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000},
    }  # fmt: skip
    assert spec.hf_config == expected


def test_every_change_is_recorded() -> None:
    found = resolved(TWINS["qwen2_5"][1])
    kinds = {change.key: change.kind for change in found.changes}
    assert kinds["model.model_config.type"] == "replaced"
    assert kinds["model.model_config.rotary_emb_base"] == "no effect"
    assert {"model.model_config.qkv_concat", "model.arch"} <= {*found.no_effect}
    assert not {"use_past", "qkv_concat", "checkpoint_name_or_path"} & {
        *written(TWINS["qwen2_5"][1])
    }


@pytest.mark.parametrize("case", TWINS)
def test_a_translated_model_is_translated_no_further(case: str) -> None:
    once = written(TWINS[case][1])
    again = resolved({"run_mode": "predict", "model": {"model_config": once}})
    assert again.config.model.model_config == once
    assert again.changes == ()


def test_architectures_name_families() -> None:
    from launcher.mindspore.model_section.family import family_of_architecture

    names = {own.architecture: family for family, own in DECODERS.items()}
    assert {name: family_of_architecture(name) for name in names} == names
    assert family_of_architecture("Glm4ForCausalLM") == "glm4"
    assert family_of_architecture("Unknown") == ""


def test_a_configuration_of_this_launcher_is_left_alone() -> None:
    own: dict[str, Any] = {
        "type": "Qwen3Config", "hidden_size": 32, "num_hidden_layers": 2, "hidden_act": "silu",
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "tie_word_embeddings": True,
        "seq_length": 32, "num_attention_heads": 4, "compute_dtype": "bfloat16",
    }  # fmt: skip
    found = resolved({"run_mode": "train", "model": {"model_config": own}})
    assert found.config.model.model_config == own
    assert found.changes == ()
    assert "model" in installed(TRANSLATIONS)
