"""Single rules of the translation of MindFormers' model keys, and the texts of their errors."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from launcher.config.resolve import resolve
from launcher.errors import UserError
from launcher.mindspore.keys_without_effect import KEYS_WITHOUT_EFFECT
from launcher.mindspore.model_section.section import KEYS
from models.families import model_spec
from models.keys import ALIASES
from tests.mindspore.yaml_models import (
    core,
    golden,
    legacy,
    problems_of,
    resolved,
    spec_of,
    written,
)

LLAMA = "type: LlamaConfig, num_layers: 2, hidden_size: 32, num_heads: 4, vocab_size: 96"
DEEPSEEK = "model_type: deepseek_v3, num_layers: 2, hidden_size: 32, num_heads: 4"
QWEN3 = "type: Qwen3Config, num_layers: 2, hidden_size: 32, num_heads: 4"
MOE = "model_type: qwen3_moe, num_layers: 2, hidden_size: 32, num_heads: 4, num_experts: 8"
YARN = {
    "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "none as a word": ('extend_method: "None", scaling_factor: 1.0', {}),
    "a map that is not used": (f"extend_method: None, scaling_factor: {json.dumps(YARN)}", {}),
    "theta wins": ("theta: 500.0, rotary_emb_base: 1000000", {"theta": 500.0}),
    "theta as null": ("theta: None, rotary_emb_base: 7000", {"rope_theta": 7000}),
    "rotary_emb_base alone": ("rotary_emb_base: 1000000", {"rope_theta": 1000000}),
    "ratio": ("rope_ratio: 500", {"rope_theta": 5000000.0}),
    "pi": (
        "extend_method: PI, scaling_factor: 2.0",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "linear": (
        "extend_method: LINEAR, scaling_factor: {factor: 2.0}",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "linear by one": ("extend_method: LINEAR, scaling_factor: 1", {}),
    "dynamic": (
        "extend_method: DYNAMIC_NTK, scaling_factor: 2.0",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "ntk": ("extend_method: NTK, scaling_factor: 4.0, theta: 100.0", {"rope_theta": 400.0}),
    "ntk of the default": ("extend_method: NTK, scaling_factor: 2.0", {"rope_theta": 20000.0}),
    "yarn keeps both mscales": (
        f"extend_method: YARN, scaling_factor: {json.dumps(YARN)}",
        {"rope_scaling": {"rope_type": "yarn"} | YARN},
    ),
    "yarn by one": (f"extend_method: YARN, scaling_factor: {json.dumps(YARN | {'factor': 1})}", {}),
    "newer yarn": (
        "position_embedding_type: yarn, rotary_scaling_factor: 4, beta_fast: 16, mscale: 1.0",
        {"rope_scaling": {
            "rope_type": "yarn", "factor": 4, "beta_fast": 16, "beta_slow": 1.0, "mscale": 1.0,
        }},
    ),
    "newer yarn by one": (
        "position_embedding_type: yarn, rotary_scaling_factor: 1, beta_fast: 32, mscale_all_dim: 1",
        {},
    ),
    "newer plain": ("position_embedding_type: rope, rotary_base: 7", {"rotary_base": 7}),
    "written scaling wins": (
        "position_embedding_type: yarn, rope_scaling: {rope_type: linear, factor: 2.0}",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPE)
def test_rotary_keys(case: str) -> None:
    keys, expected = ROPE[case]
    text = core(f"{LLAMA}, {keys}")
    found = written(text)
    plain = written(core(LLAMA))
    assert {key: value for key, value in found.items() if key not in plain} == expected
    spec_of(text)


def test_yarn_of_latent_attention_has_the_numbers_of_mindformers() -> None:
    found = written(core(f"{DEEPSEEK}, position_embedding_type: yarn, scaling_factor: 40"))
    assert found["rope_scaling"] == {
        "rope_type": "yarn", "factor": 40, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }  # fmt: skip


REFUSED: dict[str, tuple[str, str]] = {
    "method": (
        legacy(f"{LLAMA}, extend_method: YARNS"),
        "model.model_config.extend_method = 'YARNS': unknown method. Known: None, PI, LINEAR, NTK, "
        "DYNAMIC_NTK, YARN, LLAMA3.",
    ),
    "map": (
        legacy(f"{LLAMA}, extend_method: LLAMA3, scaling_factor: {{factor: 8.0}}"),
        "extend_method LLAMA3 needs a map in scaling_factor; it has no low_freq_factor and no "
        "high_freq_factor and no original_max_position_embeddings.",
    ),
    "number": (
        legacy(f"{LLAMA}, extend_method: PI, scaling_factor: -1"),
        "model.model_config.scaling_factor = -1: extend_method PI needs a number above 0.",
    ),
    "embedding dropout": (
        legacy(f"{LLAMA}, emb_dropout_prob: 0.1"),
        "model.model_config.emb_dropout_prob = 0.1: dropout of embeddings is not built yet.",
    ),
    "biases": (
        core(f"{QWEN3}, add_bias_linear: True"),
        "model.model_config.add_bias_linear = True: linear layers of the family have no biases.",
    ),
    "norms": (core(f"{QWEN3}, normalization: LayerNorm"), "Nearest: RMSNorm."),
    "norms of heads": (
        core("type: Qwen2Config, num_layers: 2, qk_layernorm: True"),
        "model.model_config.qk_layernorm = True: qwen2 has no norms of queries and keys. "
        "Nearest: False.",
    ),
    "latent attention": (
        core(f"{QWEN3}, multi_latent_attention: True"),
        "model.model_config.multi_latent_attention = True: qwen3 has plain attention.",
    ),
    "gate": (core(f"{QWEN3}, gated_linear_unit: False, hidden_act: swiglu"), "Nearest: True."),
    "quantized": (
        core(f"{DEEPSEEK}, quantization_config: {{quant_method: ptq, weight_dtype: int8}}"),
        "quantized weights of quant_method ptq cannot be read: they are in a format of MindSpore's "
        "golden stick. Load the bfloat16 weights of the model, and remove quantization_config.",
    ),
    "moving bias": (
        core(
            f"{DEEPSEEK}, moe_router_enable_expert_bias: True, moe_router_bias_update_rate: 0.001"
        ),
        "model.model_config.moe_router_bias_update_rate = 0.001: moving the router's biases in "
        "training is not built yet (model.model_config.moe_router_enable_expert_bias is on). "
        "Nearest: 0.0. With 0.0 the biases of the loaded weights are used and stay as they are.",
    ),
    "older moving bias": (
        legacy(
            "type: DeepseekV3Config, num_layers: 4", mode="finetune", arch="A",
            moe="expert_num: 8, balance_via_topk_bias: True, topk_bias_update_rate: 0.01",
        ),
        "moe_config.topk_bias_update_rate = 0.01: moving the router's biases",
    ),
    "prediction layers": (
        core(f"{DEEPSEEK}, num_nextn_predict_layers: 1, mtp_loss_factor: 0.3"),
        "model.model_config.num_nextn_predict_layers = 1: training with multi-token prediction is "
        "not built yet. Nearest: num_nextn_predict_layers = 0. Set "
        "model.model_config.num_nextn_predict_layers: 0 to train the model without its prediction "
        "layers.",
    ),
    "z-loss": (core(f"{MOE}, moe_z_loss_coeff: 0.1"), "the z-loss of the router is not built yet"),
    "shared width": (
        core(f"{DEEPSEEK}, n_shared_experts: 1, moe_intermediate_size: 24, "
             "moe_shared_expert_intermediate_size: 48"),
        "1 shared experts of 24 are 24 wide. Nearest: 24. Or set "
        "model.model_config.n_shared_experts: 2.",
    ),
    "scores": (
        core(f"{MOE}, moe_router_score_function: sigmoid"),
        "the scores of qwen3_moe are a softmax. Nearest: softmax.",
    ),
    "TeleChat3": (
        core("architectures: TeleChat3ForCausalLM"), "the family TeleChat3 is not built yet",
    ),
    "DeepSeek-V4": (
        core("model_type: deepseek_v4"), "the family DeepSeek-V4 is not built yet",
    ),
    "mixtral without shared experts": (
        legacy(LLAMA, moe="expert_num: 8, shared_expert_num: 1"),
        "moe_config.shared_expert_num = 1: mixtral has no shared experts. Nearest: 0.",
    ),
    "a gate of shared experts": (
        legacy(
            "type: DeepseekV3Config, num_layers: 4", arch="A",
            moe="expert_num: 8, shared_expert_num: 1, use_shared_expert_gating: True",
        ),
        "moe_config.use_shared_expert_gating = True: the shared expert of deepseek_v3 has no gate. "
        "Set moe_config.use_shared_expert_gating: False.",
    ),
    "shared experts without a gate": (
        legacy(f"{LLAMA}, qkv_has_bias: True", moe="expert_num: 8, shared_expert_num: 1"),
        "moe_config.shared_expert_num = 1: the shared expert of qwen2_moe has a gate.",
    ),
    "dense layers of mixtral": (
        legacy(LLAMA, moe="expert_num: 8, first_k_dense_replace: 2"),
        "moe_config.first_k_dense_replace = 2: every layer of mixtral has experts.",
    ),
    "sigmoid scores of mixtral": (
        legacy(LLAMA, moe="expert_num: 8, use_gating_sigmoid: True"),
        "moe_config.use_gating_sigmoid = True: the scores of mixtral are a softmax.",
    ),
    "experts of a dense family": (
        core(QWEN3, more="moe_config: {expert_num: 8}\n"),
        "moe_config.expert_num = 8: not built yet. Describe the experts in model.model_config",
    ),
    "experts of a family that has none": (
        legacy("type: ChatGLM2Config, num_layers: 2", moe="expert_num: 8, capacity_factor: 1.0",
               arch="ChatGLM2ForConditionalGeneration"),
        "moe_config.expert_num = 8: glm with experts is not built yet. Nearest: 1.",
    ),
    "scaled experts of mixtral": (
        core("type: MixtralConfig, num_layers: 2, routed_scaling_factor: 2.0"),
        "model.model_config.routed_scaling_factor = 2.0: mixtral does not scale routed experts.",
    ),
    "unknown key of moe_config": (
        legacy(LLAMA, moe="expert_nun: 8"), "did you mean `moe_config.expert_num`?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    text, message = REFUSED[case]
    found = problems_of(text)
    assert len(found) == 1, found
    assert found[0].startswith("x.yaml:1: ")
    assert message in found[0]


NOTHING = (
    "emb_dropout_prob: 0.0, embed_dropout_prob: 0, quantization_bit: 0, pre_seq_len: None, "
    "prefix_projection: False, moe_z_loss_coeff: 0.0, moe_router_enable_expert_bias: True, "
    'moe_router_bias_update_rate: 0.0, mtp_loss_factor: 0.3, rotary_pct: 1.0, llm_backend: "None", '
    "pretrain_seqlen: 8192, batch_size: 2, use_past_shard: False, block_size: 16, num_blocks: 512, "
    "auto_register: a.B, fp32_residual_connection: False, res_dtype: float32, eod_reset: False, "
    "residual_dtype: float16, router_dense_type: float32, fine_grain_interleave: 2, "
    "ignore_token_id: -100, moe_token_drop_policy: probs, embedding_size: 512, mlp_concat: True, "
    "post_layer_norm: True, rmsnorm: True, normalization: rmsnorm, mean: 0.0, layers_group: 4"
)


def test_neutral_values_ask_for_nothing() -> None:
    text = core(f"{LLAMA}, {NOTHING}")
    assert problems_of(text) == []
    assert written(text) == written(core(LLAMA))
    names = [part.split(":")[0].strip() for part in NOTHING.split(", ")]
    dropped = {change.key for change in resolved(text).changes if change.kind == "no effect"}
    assert {f"model.model_config.{name}" for name in names} == dropped


def test_a_word_for_null_is_null() -> None:
    text = core(f"{LLAMA}, n_kv_heads: None, head_dim: 'null'")
    assert written(text)["n_kv_heads"] is None
    assert spec_of(text).hf_config["head_dim"] == 8


def test_a_number_of_groups_that_is_none_is_kept_for_the_check_of_the_model() -> None:
    groups = "expert_num: 8, n_group: x, topk_group: 2.0"
    text = legacy("type: DeepseekV3Config", arch="DeepseekV3ForCausalLM", moe=groups)
    model = resolved(text).config.model.model_config
    assert (model["n_group"], model["topk_group"]) == ("x", 2)


@pytest.mark.parametrize("mode", ["predict", "eval"])
def test_what_trains_only_has_no_effect_elsewhere(mode: str) -> None:
    training = (
        "num_nextn_predict_layers: 1, mtp_loss_scaling_factor: 0.3, moe_z_loss_coeff: 0.1, "
        "moe_router_enable_expert_bias: True, moe_router_bias_update_rate: 0.1, "
        "moe_aux_loss_coeff: 0.1, moe_router_load_balancing_type: seq_aux_loss"
    )
    text = core(f"{DEEPSEEK}, {training}", mode=mode)
    assert problems_of(text) == []
    assert written(text) == written(core(DEEPSEEK, mode=mode))


def test_balance_loss_is_that_of_transformers() -> None:
    found = written(core(f"{MOE}, moe_aux_loss_coeff: 0.01"))
    assert (found["router_aux_loss_coef"], found["output_router_logits"]) == (0.01, True)
    experts = (
        "expert_num: 8, num_experts_chosen: 2, aux_loss_types: [expert], aux_loss_factors: [0.02]"
    )
    found = written(legacy(LLAMA, moe=experts, mode="finetune"))
    assert (found["router_aux_loss_coef"], found["output_router_logits"]) == (0.02, True)


def test_prediction_layers_of_config_json_are_asked_for_by_their_loss(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(golden("deepseek_v3")))
    place = f"pretrained_model_dir: {tmp_path}\n"
    assert "multi-token prediction" in problems_of(core("mtp_loss_factor: 0.3", more=place))[0]
    off = core("mtp_loss_factor: 0.3, num_nextn_predict_layers: 0", more=place)
    assert problems_of(off) == []
    assert problems_of(core("mtp_loss_factor: 0.3", more=place, mode="predict")) == []


ORDERS = {
    "use_contiguous_weight_layout_attention: False": {"mindformers_qkv_order": "group"},
    "use_contiguous_weight_layout_attention: True": {"mindformers_qkv_order": "plain"},
    "use_interleaved_weight_layout_mlp: False": {"mindformers_mlp_order": "plain"},
    "use_interleaved_weight_layout_mlp: True": {"mindformers_mlp_order": "pair"},
    "use_contiguous_weight_layout: False": {
        "mindformers_qkv_order": "group", "mindformers_mlp_order": "plain",
    },
    "use_contiguous_weight_layout: True": {
        "mindformers_qkv_order": "plain", "mindformers_mlp_order": "plain",
    },
    "qkv_concat: True, ffn_concat: True, mla_qkv_concat: True": {},
    "use_rearrange_rope: True": {"mindformers_rearranged_rope": True},
}  # fmt: skip


@pytest.mark.parametrize("keys", ORDERS)
def test_layout_keys_describe_the_weights(keys: str) -> None:
    names = ("qkv_order", "mlp_order", "tensor_parallel", "use_gmm", "rearranged_rope")

    def orders(more: str) -> dict[str, Any]:
        config = resolved(core(f"{QWEN3}, {keys}", more=more)).config
        found = {f"mindformers_{name}": getattr(config, f"mindformers_{name}") for name in names}
        return {key: value for key, value in found.items() if value is not None}

    assert orders("load_checkpoint: weights\n") == ORDERS[keys]
    assert orders("load_checkpoint: ''\n") == {}
    own = "load_checkpoint: w\nmindformers_qkv_order: plain\nmindformers_mlp_order: pair\n"
    assert {"plain", "pair"} <= {*orders(own).values()}


def test_checkpoint_name_or_path(tmp_path: Path) -> None:
    key = f"checkpoint_name_or_path: {tmp_path}"
    assert resolved(legacy(f"{LLAMA}, {key}")).config.load_checkpoint == str(tmp_path)
    assert (
        resolved(legacy(f"{LLAMA}, checkpoint_name_or_path: llama2_7b")).config.load_checkpoint
        == ""
    )
    both = f"load_checkpoint: /elsewhere\n{legacy(f'{LLAMA}, {key}')}"
    assert resolved(both).config.load_checkpoint == "/elsewhere"


@pytest.mark.parametrize(
    ("offset", "stages", "kept"),
    [
        ("0", 2, True), ("[0, 0, 0, 0]", 2, False), ("[[0, 0], [0, 0]]", 4, False),
        ("[0, 0]", 2, True), ("[-1, 1]", 2, True), ("[-1, 1, 1, -1]", 2, True),
        ("[1, 2, 3]", 1, True), ("None", 2, False),
    ],
)  # fmt: skip
def test_offset_of_another_pipeline_degree(offset: str, stages: int, kept: bool) -> None:
    more = f"parallel_config: {{pipeline_stage: {stages}}}\n"
    assert ("offset" in written(core(f"{QWEN3}, offset: {offset}", more=more))) == kept


def test_interleaving_of_one_stage_a_rank_is_none() -> None:
    pipeline = "parallel: {pipeline_config: {pipeline_interleave: True}}\n"

    def interleaves(keys: str) -> bool:
        config = resolved(core(f"{QWEN3}, {keys}", more=pipeline)).config
        return config.parallel.pipeline_config.pipeline_interleave

    assert not interleaves("pp_interleave_num: 1")
    assert interleaves("pp_interleave_num: 2")
    found = resolved(f"{pipeline}{legacy(f'{LLAMA}, pp_interleave_num: 1', mode='train')}").config
    assert not found.parallel.pipeline_config.pipeline_interleave


def test_boosted_models_are_ordinary_ones() -> None:
    def family(keys: str) -> str:
        return spec_of(legacy(f"{keys}, num_layers: 2, llm_backend: BuildIn")).family

    assert family("type: LlmBoostConfig, boost_model_name: Llama") == "llama"
    assert family("type: LlmBoostConfig, boost_model_name: Qwen") == "qwen2"
    assert family("type: LlamaConfig, boost_model_name: Llama") == "llama"


def test_positions_of_the_older_classes() -> None:
    def positions(keys: str, mode: str = "predict") -> Any:
        return spec_of(legacy(f"{LLAMA}, {keys}", mode=mode)).hf_config["max_position_embeddings"]

    assert positions("seq_length: 512") == 512
    assert positions("seq_length: 512, max_position_embedding: 1024") == 1024
    assert positions("seq_length: 512, max_position_embedding: 256") == 512
    assert positions("max_position_embedding: 256") == 256


def test_weights_of_half_precision_are_trained_in_float32() -> None:
    keys = f"{LLAMA}, param_init_type: float16"
    assert spec_of(legacy(keys, mode="finetune")).precision.params_dtype == "float32"
    assert spec_of(legacy(keys)).precision.params_dtype == "float16"


def test_the_command_line_wins_over_another_spelling(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(legacy(f"{LLAMA}, theta: 5.0, n_kv_heads: 4, param_init_type: float32"))
    overrides = {
        "num_hidden_layers": 3, "rope_theta": 7.0, "num_key_value_heads": 2,
        "params_dtype": "bfloat16", "hidden_size": 64,
    }  # fmt: skip
    words = [f"model.model_config.{key}={value}" for key, value in overrides.items()]
    found = resolve(str(path), overrides=words)
    assert found.problems == ()
    spec = model_spec(found.config.model.model_config, None)
    assert spec.hf_config["rope_parameters"]["rope_theta"] == 7.0
    assert spec.precision.params_dtype == "bfloat16"
    sizes = ("num_hidden_layers", "num_key_value_heads", "hidden_size", "num_attention_heads")
    assert [spec.hf_config[key] for key in sizes] == [3, 2, 64, 4]


def test_scaled_experts_of_qwen3_moe() -> None:
    sizes = f"{MOE}, num_experts_per_tok: 2, moe_intermediate_size: 8"
    spec = spec_of(core(f"{sizes}, routed_scaling_factor: 1.5"))
    experts = spec.decoder and spec.decoder.experts
    assert experts is not None
    assert experts.routed_scaling_factor == 1.5
    assert spec.hf_config["router_topk_scaling_factor"] == 1.5
    assert any("transformers ignores it" in note for note in spec.notes)
    assert "router_topk_scaling_factor" not in spec_of(core(sizes)).hf_config


WRONG: tuple[Any, ...] = (
    *(None, "None", "", "x", True, False, 0, 1, -1, 2.5, 1e400, float("nan"), 10**400, [], [1]),
    *([None], {}, {"factor": "x"}, {"factor": 2.0}, [[]], [[1], "a"], {"a": {}}, "1.0"),
)


@pytest.mark.parametrize("seed", range(4))
def test_no_value_is_a_mistake_of_ours(seed: int) -> None:
    """Whatever is written: problems, never an exception of another kind."""
    draw = random.Random(seed)
    names = sorted(KEYS | {"type", "model_type", "architectures", "num_experts", *ALIASES})
    inside = sorted(
        KEYS_WITHOUT_EFFECT["moe_config"]["experts are described in model.model_config"]
    )
    kinds = [
        "LlamaConfig",
        "DeepseekV3Config",
        "ChatGLM2Config",
        "TelechatConfig",
        "Qwen3MoeConfig",
    ]
    for _ in range(150):
        section = {"type": draw.choice(kinds), "num_layers": 2}
        section |= {draw.choice(names): draw.choice(WRONG) for _ in range(draw.randrange(6))}
        moe = {draw.choice(inside): draw.choice(WRONG) for _ in range(draw.randrange(4))}
        tree = {
            "run_mode": draw.choice(["train", "predict", None]),
            "model": {"model_config": section, "arch": {"type": draw.choice(["A", None, 3])}},
            "moe_config": moe | {"expert_num": draw.choice([8, 1, *WRONG])},
            "load_checkpoint": draw.choice(["", "w"]),
        }
        found = resolved(tree)
        with contextlib.suppress(UserError):
            model_spec(found.config.model.model_config, None)
