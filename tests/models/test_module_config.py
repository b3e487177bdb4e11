"""Keys of the YAML over config.json, for families that run through their transformers module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from launcher.errors import UserError
from models.config_class import config_class
from models.families import TRANSFORMERS_MODULES, ModelConfigError, model_spec
from models.transformers_model import complete_config
from tests.models.test_config_fields import tiny_json

ROTARY = [f for f in TRANSFORMERS_MODULES if (k := config_class(f)) is not None and k.has_rope]
A_FEW = ["olmo2", "granite", "smollm3", "ministral3", "gpt_neox", "gemma3_text", "apertus", "phi3"]
LINEAR = {"rope_type": "linear", "factor": 4.0}


def rope_of(base: dict[str, Any], **model_config: Any) -> dict[str, Any]:
    """The rope settings that the transformers module gets."""
    rope: dict[str, Any] = complete_config(
        model_spec(model_config, copy.deepcopy(base))
    ).rope_parameters
    return rope


def check(family: str) -> None:
    """Rope settings of the YAML are used, over both spellings of config.json, or refused."""
    saved = tiny_json(family)
    bare = {key: value for key, value in saved.items() if key != "rope_parameters"}
    older = bare | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    for base in (saved, bare, older):
        for written in ({"rope_theta": 77.0}, {"rope_scaling": LINEAR},
                        {"rope_parameters": LINEAR | {"rope_theta": 33.0}}):  # fmt: skip
            ((key, value),) = written.items()
            wanted = value if isinstance(value, dict) else written
            try:
                rope = rope_of(base, **written)
            except UserError as error:
                assert key in str(error) or family in ("phi3", "phimoe")  # noqa: PT017
                continue
            assert not any(isinstance(entry, Mapping) for entry in rope.values())
            assert wanted.items() <= rope.items()
            if base is older and key == "rope_theta":
                assert rope["factor"] == 2.0
    if "rope_type" in saved.get("rope_parameters", {}):
        assert rope_of(saved, rope_theta=77.0)["rope_theta"] == 77.0


@pytest.mark.parametrize("family", A_FEW)
def test_rope_settings(family: str) -> None:
    check(family)


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in ROTARY if f not in (*A_FEW, "cohere_compass_text")])
def test_rope_settings_of_the_others(family: str) -> None:
    check(family)


BY_LAYER = {"full_attention": {"rope_type": "default", "rope_theta": 5.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 6.0}}  # fmt: skip


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3", "modernbert-decoder"])
def test_rope_settings_by_layer_type(family: str) -> None:
    base = tiny_json(family)
    assert rope_of(base, rope_parameters=BY_LAYER) == BY_LAYER
    one = {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}
    rope = rope_of(base, rope_parameters=one)
    assert rope["full_attention"] == one["full_attention"]
    assert rope["sliding_attention"] == rope_of(base)["sliding_attention"]
    with pytest.raises(ModelConfigError) as raised:
        model_spec({"theta": 7.0}, base)
    assert "model.model_config.theta: this family has rope settings by layer type" in str(
        raised.value
    )


def test_part_of_a_head_is_rotated() -> None:
    base = tiny_json("gpt_neox")
    rope = rope_of(base, partial_rotary_factor=0.5)
    assert rope == base["rope_parameters"] | {"partial_rotary_factor": 0.5}
    assert rope_of(base, rotary_pct=0.5) == rope
    old = {key: value for key, value in base.items() if key != "rope_parameters"}
    old |= {"rotary_pct": 1.0, "rotary_emb_base": 500}
    rope = rope_of(old, partial_rotary_factor=0.5)
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (0.5, 500)
    # What the module does not read is refused.
    with pytest.raises(ModelConfigError, match="partial_rotary_factor: Olmo2Config has no such"):
        model_spec({"partial_rotary_factor": 0.5}, tiny_json("olmo2"))


SPELLINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "of the family, where an alias is an other key": (
        "gpt2", {"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": 1e-3},
    ),
    "of starcoder2": ("starcoder2", {"norm_epsilon": 1e-3}, {"norm_epsilon": 1e-3}),
    "of xlstm's kind": ("zamba2", {"add_bias_linear": True}, {"add_bias_linear": True}),
    "of big_bird": ("big_bird", {"block_size": 4}, {"block_size": 4}),
    "second names": ("gpt2", {"hidden_size": 64, "num_layers": 3}, {"n_embd": 64, "n_layer": 3}),
    "of MindFormers": ("falcon", {"n_heads": 2}, {"num_attention_heads": 2}),
    "of a number of experts": ("olmoe", {"expert_num": 8}, {"num_experts": 8}),
    "of another number of experts": ("jetmoe", {"expert_num": 8}, {"num_local_experts": 8}),
    "first name that is no field": (
        "bailing_hybrid", {"max_position_embeddings": 128}, {"model_max_length": 128},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    family, written, stored = SPELLINGS[name]
    content = model_spec(written, tiny_json(family)).hf_config
    assert stored.items() <= content.items()
    config = complete_config(model_spec(written, tiny_json(family)))
    assert all(getattr(config, key) == value for key, value in stored.items())


def test_sections_are_merged() -> None:
    base = tiny_json("mpt") | {"attn_config": {"alibi": True, "clip_qkv": 2.0}}
    spec = model_spec({"attn_config": {"attn_pdrop": 0.5}}, base)
    assert spec.hf_config["attn_config"] == {"alibi": True, "clip_qkv": 2.0, "attn_pdrop": 0.5}
    with pytest.raises(ModelConfigError) as raised:
        model_spec({"attn_config": {"attn_drop": 0.5}}, base)
    assert str(raised.value) == (
        "model.model_config.attn_config.attn_drop: MptAttentionConfig has no such key. "
        "did you mean `attn_pdrop`?"
    )


def test_a_key_that_another_one_overrides() -> None:
    base = tiny_json("smollm3")
    with pytest.raises(ModelConfigError) as raised:
        model_spec({"no_rope_layer_interval": 2}, base)
    assert "no effect: config.json has no_rope_layers" in str(raised.value)
    spec = model_spec({"no_rope_layer_interval": 2, "no_rope_layers": None}, base)
    assert complete_config(spec).no_rope_layers == [1, 0]
    del base["no_rope_layers"]
    assert complete_config(model_spec({"no_rope_layer_interval": 2}, base)).no_rope_layers == [1, 0]


def test_layers_that_a_list_of_config_json_does_not_have() -> None:
    base = tiny_json("gemma2")
    with pytest.raises(ModelConfigError) as raised:
        model_spec({"num_layers": 3}, base)
    assert str(raised.value) == (
        "model.model_config.num_layers = 3: layer_types of config.json has 2 entries. "
        "Set model.model_config.layer_types, or set it to null to derive it."
    )
    config = complete_config(model_spec({"num_layers": 3, "layer_types": None}, base))
    assert len(config.layer_types) == 3
    assert model_spec({"num_layers": 2}, base).hf_config["num_hidden_layers"] == 2


@pytest.mark.parametrize("key", ["position_embedding_type", "normalization", "swiglu"])
def test_keys_of_other_programs_are_refused(key: str) -> None:
    with pytest.raises(ModelConfigError, match=f"{key}: MptConfig has no such key"):
        model_spec({key: "alibi"}, tiny_json("mpt"))
    with pytest.raises(ModelConfigError, match=f"{key} = x: unknown key for this model"):
        model_spec({"type": "LlamaConfig", key: "x"}, None)


def test_two_names_of_a_key_must_agree() -> None:
    with pytest.raises(
        ModelConfigError, match=r"conflicts with model.model_config.hidden_size = 64, the same key"
    ):
        model_spec({"hidden_size": 64, "n_embd": 32}, tiny_json("gpt2"))
