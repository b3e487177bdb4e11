"""Families: defaults, spellings, and what they mean for the decoder."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from models import keys
from models.families import (
    DECODERS,
    TRANSFORMERS_MODULES,
    UNSUPPORTED,
    model_spec,
)
from models.names import is_multi_token_prediction
from tests.models.tiny import DEEPSEEK, EXPERTS, IN_TRANSFORMERS, LLAMA, QWEN_MOE, problems_of

DO_NOT_DIVIDE = {"glm4_moe": {"head_dim": 128}}
"""Families whose default width cannot be divided by their default heads."""


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    from transformers import CONFIG_MAPPING

    given = DO_NOT_DIVIDE.get(family, {})
    spec = model_spec({"type": DECODERS[family].config_class, **given}, None)
    config = CONFIG_MAPPING[family](**given)
    expected = config.to_dict()
    for old, new in config.attribute_map.items():
        expected.setdefault(old, expected.get(new))
    differing = {
        key: (value, expected.get(key, "absent"))
        for key, value in spec.hf_config.items()
        if key != "architectures" and expected.get(key, "absent") != value
    }
    assert not differing
    left_out = {k for k in expected if k not in spec.hf_config}
    if expected.get("head_dim") is None:
        left_out -= {"head_dim"}
    if DECODERS[family].expert_count:
        left_out -= {"num_experts", "num_local_experts"}  # another spelling is there
    if DECODERS[family].has_latent:
        left_out -= {"head_dim", "qk_head_dim"}  # derived from the others
    # What is not in config.json is the same for every model, or has no effect on a decoder.
    assert left_out <= {
        "transformers_version", "output_hidden_states", "return_dict", "dtype", "id2label",
        "chunk_size_feed_forward", "is_encoder_decoder", "label2id", "problem_type",
        "pretraining_tp",
        "_name_or_path", "output_attentions", "num_mtp_layers",
    }  # fmt: skip


def test_every_causal_model_type_is_in_one_table() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = [*IN_TRANSFORMERS, *TRANSFORMERS_MODULES, *UNSUPPORTED]
    assert len(rows) == len(set(rows))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(rows)
    assert {*IN_TRANSFORMERS, *TRANSFORMERS_MODULES} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert all(
        CONFIG_MAPPING_NAMES[name] == DECODERS[name].config_class for name in IN_TRANSFORMERS
    )


CONFIG_FILES: dict[str, dict[str, Any]] = {
    "old spelling": {
        "model_type": "llama", "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "linear", "factor": 2.0}, "vocab_size": 64,
    },
    "new spelling": {
        "model_type": "llama", "dtype": "bfloat16", "vocab_size": 64,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_both_spellings_of_config_json_mean_the_same(name: str) -> None:
    spec = model_spec({}, CONFIG_FILES[name])
    assert spec.decoder is not None
    assert spec.decoder.rope_theta == 500000.0
    assert spec.decoder.rope_scaling is not None
    assert spec.decoder.rope_scaling["rope_type"] == "linear"
    assert spec.hf_config["dtype"] == "bfloat16"
    assert spec.precision.params_dtype is None  # the dtype of the files is not that of training
    assert "rope_theta" not in spec.hf_config
    assert spec.hf_config["rope_parameters"] == {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0,
    }  # fmt: skip


def test_config_json_of_transformers_is_read_unchanged() -> None:
    """What transformers writes is read as the same configuration, including unknown keys."""
    from transformers import AutoConfig, Qwen3Config

    written = Qwen3Config(num_hidden_layers=2, use_sliding_window=True, max_window_layers=1)
    content = written.to_diff_dict() | {"an_extra_key": 3}
    spec = model_spec({}, content)
    assert spec.hf_config["an_extra_key"] == 3
    again = AutoConfig.for_model(**spec.hf_config)
    again.architectures = None
    assert again.to_dict() == written.to_dict() | {"an_extra_key": 3}
    assert spec.decoder is not None
    assert spec.decoder.sliding_window == (None, 4096)


def test_the_yaml_overrides_config_json() -> None:
    base = CONFIG_FILES["new spelling"] | {"num_hidden_layers": 4, "max_position_embeddings": 128}
    spec = model_spec({"num_layers": 2, "theta": 1e4, "seq_length": 128}, base)
    assert spec.decoder is not None
    assert spec.decoder.num_hidden_layers == 2
    assert spec.decoder.rope_theta == 1e4
    assert spec.decoder.rope_scaling is not None
    assert spec.decoder.rope_scaling["factor"] == 2.0
    spec = model_spec({"rope_scaling": None}, base)
    assert spec.decoder is not None
    assert spec.decoder.rope_scaling is None
    assert spec.decoder.rope_theta == 500000.0


def test_fewer_layers_shorten_the_layer_types() -> None:
    base = {
        "model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True,
        "sliding_window": 16, "max_window_layers": 1,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
    }  # fmt: skip
    spec = model_spec({"num_layers": 2}, base)
    assert spec.decoder is not None
    assert spec.decoder.sliding_window == (None, 16)
    assert spec.hf_config["layer_types"] == ["full_attention", "sliding_attention"]


def test_mindformers_spellings() -> None:
    spec = model_spec(
        {
            "type": "Qwen3Config", "num_layers": 2, "num_heads": 8, "n_kv_heads": 4, "head_dim": 16,
            "hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "seq_length": 512,
            "max_position_embedding": 1024, "theta": 1e6, "compute_dtype": "bfloat16",
            "param_init_type": "float32", "layernorm_compute_type": "float32",
            "rotary_dtype": "bf16",
            "softmax_compute_type": "float32", "top_k": 3, "max_decode_length": 64,
            "tie_word_embeddings": True, "qkv_has_bias": False, "expert_num": 1,
            "attention_dropout_rate": 0.1, "hidden_dropout_rate": 0.2,
        },
        None,
    )  # fmt: skip
    decoder = spec.decoder
    assert decoder is not None
    assert (decoder.num_hidden_layers, decoder.num_attention_heads) == (2, 8)
    assert (decoder.num_key_value_heads, decoder.head_dim) == (4, 16)
    assert (decoder.max_position_embeddings, decoder.rope_theta) == (1024, 1e6)
    assert (decoder.attention_dropout, decoder.hidden_dropout) == (0.1, 0.2)
    assert decoder.tie_word_embeddings
    assert spec.seq_length == 512
    assert spec.precision.compute_dtype == spec.precision.rotary_dtype == "bfloat16"
    assert spec.precision.params_dtype == spec.precision.layernorm_compute_dtype == "float32"
    assert spec.generation == {"top_k": 3, "max_length": 64}
    without_effect = {note.split(" = ")[0].rpartition(".")[2] for note in spec.notes}
    assert without_effect == {"softmax_compute_type"}
    assert spec.notes[0].startswith("model.model_config.softmax_compute_type = float32: used o")
    assert "hidden_dropout" not in spec.hf_config
    llama = model_spec(LLAMA | {"num_layers": 2}, None)
    assert not {"layer_types", "num_layers", "type"} & set(llama.hf_config)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
@pytest.mark.parametrize("family", EXPERTS)
def test_the_number_of_experts_has_many_spellings(family: str, key: str) -> None:
    own, given = DECODERS[family], DO_NOT_DIVIDE.get(family, {})
    for spec in (
        model_spec({"type": own.config_class, key: 32, **given}, None),
        model_spec({}, {"model_type": family, key: 32, **given}),
        model_spec({key: 32}, {"model_type": family, "num_experts": 64, **given}),
    ):
        assert spec.decoder is not None
        assert spec.decoder.experts is not None
        assert spec.decoder.experts.num_experts == 32
        assert spec.hf_config[str(own.expert_count)] == 32


def test_mindformers_spellings_of_experts() -> None:
    spec = model_spec(
        DEEPSEEK | {
            "num_heads": 4, "expert_num": 16, "num_experts_chosen": 2, "moe_router_num_groups": 4,
            "moe_router_group_topk": 2, "moe_ffn_hidden_size": 24, "shared_expert_num": 2,
            "moe_router_topk_scaling_factor": 1.5,
        },
        None,
    )  # fmt: skip
    assert spec.decoder is not None
    experts = spec.decoder.experts
    assert experts is not None
    assert (experts.num_experts, experts.experts_per_token) == (16, 2)
    assert (experts.groups, experts.groups_per_token) == (4, 2)
    assert (experts.intermediate_size, experts.shared_experts) == (24, 2)
    assert experts.routed_scaling_factor == 1.5
    assert spec.hf_config["num_key_value_heads"] == 4
    mixtral = model_spec({"type": "MixtralConfig", "expert_num": 4, "aux_loss_factor": 0.01}, None)
    assert mixtral.decoder is not None
    assert mixtral.decoder.experts is not None
    assert not mixtral.decoder.experts.balance_on
    assert mixtral.hf_config["router_aux_loss_coef"] == 0.01


def test_which_layers_have_experts() -> None:
    def layers(**model_config: Any) -> tuple[bool, ...]:
        spec = model_spec({"num_layers": 4, **model_config}, None)
        assert spec.decoder is not None
        assert spec.decoder.experts is not None
        return spec.decoder.experts.layers

    assert layers(type="MixtralConfig") == (True,) * 4
    assert layers(**QWEN_MOE, decoder_sparse_step=2) == (False, True, False, True)
    assert layers(**QWEN_MOE, mlp_only_layers=[0, 2]) == (False, True, False, True)
    assert layers(**DEEPSEEK, first_k_dense_replace=1) == (False, True, True, True)


def test_a_balance_loss_is_added_only_if_configured() -> None:
    for asked, coefficient in ((True, 0.001), (False, 0.0)):
        spec = model_spec(QWEN_MOE | {"output_router_logits": asked}, None)
        assert spec.decoder is not None
        assert spec.decoder.experts is not None
        assert spec.decoder.experts.balance_coefficient == coefficient


def test_multi_token_prediction_modules_are_ignored() -> None:
    base = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "num_hidden_layers": 2}
    spec = model_spec({}, base)
    assert spec.notes == (
        "config.json: num_nextn_predict_layers = 1: multi-token prediction is ignored",
    )
    names = ["model.layers.1.input_layernorm.weight", "model.layers.2.enorm.weight",
             "model.layers.3.enorm.weight", "model.norm.weight"]  # fmt: skip
    assert [is_multi_token_prediction(name, spec) for name in names] == [False, True, False, False]
    with_llama = {"model_type": "llama", "num_nextn_predict_layers": 1}
    assert "needs multi-token prediction: not built yet" in problems_of({}, with_llama)


def test_config_json_of_deepseek_is_read_with_what_transformers_adds() -> None:
    from transformers import DeepseekV3Config

    written = DeepseekV3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    spec = model_spec({}, written.to_dict() | {"model_type": "deepseek_v3"})
    assert spec.decoder is not None
    assert spec.decoder.head_dim == spec.decoder.latent.qk_rope_head_dim == 64
    assert not {"head_dim", "qk_head_dim"} & set(spec.hf_config)


def test_positions_follow_the_sequence_length_only_by_default() -> None:
    spec = model_spec(LLAMA | {"seq_length": 8192}, None)
    assert spec.hf_config["max_position_embeddings"] == 8192
    assert model_spec(LLAMA | {"seq_length": 64}, None).hf_config["max_position_embeddings"] == 2048


def test_every_key_has_one_meaning() -> None:
    tables = [keys.ALIASES, keys.EXPERT_COUNTS, keys.PRECISIONS, keys.GENERATION, keys.GENERAL,
              keys.ROPE, keys.NOT_BUILT]  # fmt: skip
    spellings = [key for table in tables for key in table if key != keys.ALIASES.get(key)]
    twice = {key for key in spellings if spellings.count(key) > 1}
    assert not twice


def test_import_is_light() -> None:
    code = (
        "import sys, models.families;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
