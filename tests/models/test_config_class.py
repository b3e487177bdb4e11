"""What is parsed from the source of a configuration class equals the class itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.config_class import COMMON_KEYS, class_names, config_class, is_causal_type, mentioned
from models.families import ModelConfigError, model_spec
from models.module_table import TRANSFORMERS_MODULES

_BASE = {field.name for field in dataclasses.fields(PretrainedConfig)}


def check(family: str) -> None:
    real, known = CONFIG_MAPPING[family], config_class(family)
    assert known is not None
    fields = {field.name: field.default for field in dataclasses.fields(real)}
    assert known.name == real.__name__
    assert set(fields) - _BASE <= set(known.defaults) <= set(fields)
    assert dict(known.synonyms) == real.attribute_map
    for key, default in known.defaults.items():
        assert default is None or default == fields[key], key
    of_their_own = {
        key for key, kind in (real.sub_configs or {}).items() if kind.__name__ != "AutoConfig"
    }
    assert set(known.sections) == of_their_own


@pytest.mark.parametrize("family", ["gpt2", "gpt-sw3", "mpt", "gemma3_text", "bailing_hybrid"])
def test_a_class(family: str) -> None:
    check(family)


@pytest.mark.long
@pytest.mark.parametrize("family", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_class(family: str) -> None:
    check(family)


@pytest.mark.long
@pytest.mark.parametrize("family", TRANSFORMERS_MODULES)
def test_layer_types_with_separate_rope_settings(family: str) -> None:
    known = config_class(family)
    assert known is not None
    rope: dict[str, Any] = getattr(CONFIG_MAPPING[family](), "rope_parameters", None) or {}
    by_layer = any(isinstance(value, dict) for value in rope.values())
    assert bool(known.rope_kinds) == by_layer
    assert set(known.rope_kinds) <= set(rope)


def test_types_without_a_causal_language_model_are_refused() -> None:
    """All those of transformers for images, audio and text, before anything is loaded."""
    others = class_names().keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"gpt-sw3"}
    assert {"albert", "clip", "modernbert", "flaubert", "qwen2_audio"} <= others
    for model_type in others:
        with pytest.raises(ModelConfigError, match=f"model_type = {model_type}"):
            model_spec({}, {"model_type": model_type})
    assert all(map(is_causal_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def test_names_of_a_key() -> None:
    gpt2, bailing = config_class("gpt2"), config_class("bailing_hybrid")
    assert gpt2 is not None
    assert bailing is not None
    assert gpt2.names_of("hidden_size") == gpt2.names_of("n_embd") == ["n_embd", "hidden_size"]
    assert gpt2.default("max_position_embeddings") == 1024
    assert not gpt2.has("hidden_siz")
    # The first name is only in the attribute map.
    assert bailing.key("max_position_embeddings") == "model_max_length"
    assert bailing.has("model_max_length")
    assert bailing.default("model_max_length") == 262144


def test_what_a_key_is_derived_from() -> None:
    known = config_class("smollm3")
    assert known is not None
    assert "no_rope_layer_interval" in known.derived["no_rope_layers"]
    assert not mentioned("smollm3", "no_rope_layer_interval")
    assert mentioned("smollm3", "no_rope_layers")
    assert {"rotary_pct", "rotary_emb_base"} <= config_class("gpt_neox").old_keys  # type: ignore[union-attr]


def test_keys_that_every_config_may_have() -> None:
    assert _BASE - {"per_layer_config"} <= COMMON_KEYS
    assert config_class("no_such_type") is None
