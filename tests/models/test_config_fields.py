"""Any key of a configuration with another value: the same model as transformers, or an error."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from launcher.errors import UserError
from models.config_class import ConfigClass, config_class
from models.families import DECODERS, TRANSFORMERS_MODULES, ModelConfigError, model_spec
from models.transformers_model import complete_config
from tests.models.test_tensor_mapping import loaded
from tests.models.tiny import IN_TRANSFORMERS, WITH_CODE_OF_THEIR_OWN, tokens
from tests.models.zoo import tiny_config

OTHER: dict[str, Any] = {
    "hidden_act": "gelu", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97, "pad_token_id": 3,
    "bos_token_id": 4, "eos_token_id": 5, "layer_types": ["sliding_attention", "full_attention"],
    "mlp_only_layers": [0], "decoder_sparse_step": 2, "max_window_layers": 1, "sliding_window": 9,
    "first_k_dense_replace": 2, "q_lora_rank": None, "n_shared_experts": 0, "n_group": 2,
    "num_experts_per_tok": 1, "qk_rope_head_dim": 16,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 333.0},
}  # fmt: skip
"""Another value than that of a tiny configuration; the rest are generated."""

OF_OTHER_FAMILIES: dict[str, Any] = {
    "sliding_window": 8, "routed_scaling_factor": 2.0, "hidden_dropout": 0.4,
    "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True,
    "mlp_bias": True, "use_sliding_window": True, "max_window_layers": 1, "norm_topk_prob": True,
    "attn_logit_softcapping": 3.0, "use_qk_norm": True, "no_rope_layers": [0, 1],
    "logits_scaling": 2.0, "qkv_bias": True, "rope_interleave": False,
}  # fmt: skip
"""Keys that a family may lack, and then ignores."""


def another(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value * 2
    return (value * 3 or 0.1) if isinstance(value, float) else value


def tiny_json(family: str) -> dict[str, Any]:
    """config.json of a tiny model as transformers writes it, with all keys."""
    if family in WITH_CODE_OF_THEIR_OWN:
        return dict(WITH_CODE_OF_THEIR_OWN[family])
    config = CONFIG_MAPPING[family](**tiny_config(family))
    content = json.loads(config.to_json_string(use_diff=family not in DECODERS))
    plain: dict[str, Any] = PretrainedConfig._decode_special_floats(content)
    return {k: v for k, v in plain.items() if k != "transformers_version"} | {"model_type": family}


def fields_of(family: str) -> list[tuple[str, Any]]:
    known, base = config_class(family), tiny_json(family)
    assert known is not None
    values = OF_OTHER_FAMILIES | {key: another(key, base.get(key)) for key in known.defaults}
    return [(key, value) for key, value in values.items() if base.get(key, "absent") != value]


def names(error: UserError, family: str, key: str) -> bool:
    """Whether an error contains a key, by one of its names or in words."""
    known = config_class(family)
    assert known is not None
    spelled = [*known.names_of(key), key.removeprefix("num_").replace("_", " ")]
    return any(name in str(error) for name in spelled)


OWN = [
    (family, key, value, place)
    for family in IN_TRANSFORMERS
    for key, value in fields_of(family)
    for place in ("config.json", "YAML")
]
SAMPLE = random.Random(15).sample(range(len(OWN)), 30)


def module_of(config: dict[str, Any], folder: Path) -> tuple[Any, torch.Tensor] | None:
    """The tokens and logits of the transformers module of `config`, saved into `folder`."""
    try:
        real = CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(config))
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(real).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            input_ids = tokens(2, 24)
            logits = module(input_ids, use_cache=False).logits
    except Exception:
        return None  # transformers cannot build it either
    module.save_pretrained(folder)
    return input_ids, logits


def check(family: str, key: str, value: Any, place: str, folder: Path) -> None:
    base = tiny_json(family)
    expected = module_of(base | {key: value}, folder)
    try:
        if place == "YAML":
            spec = model_spec({key: value}, base)
        else:
            spec = model_spec({}, base | {key: value})
    except ModelConfigError as error:
        assert expected is None or names(error, family, key)  # noqa: PT017
        return
    if expected is None:
        return
    known = config_class(family)
    assert known is not None
    if not known.has(key):
        assert any(key in note for note in spec.notes) or (key, place) == ("hidden_dropout", "YAML")
    input_ids, logits = expected
    with torch.no_grad():
        torch.testing.assert_close(loaded(spec, folder)(input_ids), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "key", "value", "place"), [OWN[index] for index in SAMPLE])
def test_a_key_of_a_family_with_a_decoder(
    family: str, key: str, value: Any, place: str, tmp_path: Path
) -> None:
    check(family, key, value, place, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_every_key_of_a_family_with_a_decoder(family: str, tmp_path: Path) -> None:
    for index, case in enumerate(case for case in OWN if case[0] == family):
        check(*case, tmp_path / str(index))


IGNORED = {
    "llama": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
              "hidden_dropout": 0.4},
    "mistral": {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": True},
    "mixtral": {"routed_scaling_factor": 2.0, "norm_topk_prob": False},
    "qwen3_moe": {"routed_scaling_factor": 2.0, "mlp_bias": True},
    "deepseek_v3": {"sliding_window": 8, "use_sliding_window": True},
    "gpt_oss": {"norm_topk_prob": True, "use_sliding_window": True, "n_group": 2},
    "glm4_moe": {"sliding_window": 8, "mlp_bias": True, "kv_lora_rank": 8},
}  # fmt: skip


@pytest.mark.parametrize("family", IGNORED)
def test_keys_that_a_family_lacks_are_ignored_and_named_once(family: str, tmp_path: Path) -> None:
    config = tiny_json(family) | IGNORED[family]
    expected = module_of(config, tmp_path)
    assert expected is not None
    spec = model_spec({}, config)
    with torch.no_grad():
        own = loaded(spec, tmp_path)(expected[0])
    torch.testing.assert_close(own, expected[1], rtol=1e-5, atol=1e-5)
    named = f"config.json: {', '.join(IGNORED[family])}: {DECODERS[family].config_class} has no"
    assert [note for note in spec.notes if note.startswith(named)]
    assert IGNORED[family].items() <= spec.hf_config.items()
    for key in IGNORED[family].keys() - {"hidden_dropout"}:
        with pytest.raises(ModelConfigError, match=f"{key} = .*: unknown key for this model"):
            model_spec({key: IGNORED[family][key]}, tiny_json(family))


def with_key(base: dict[str, Any], known: ConfigClass, key: str, value: Any) -> dict[str, Any]:
    """config.json with another value of `key`, under that name alone."""
    names = known.names_of(key)
    return {k: v for k, v in copy.deepcopy(base).items() if k not in names} | {key: value}


def as_json(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    content.pop("architectures", None)
    return content


def check_module(family: str) -> None:
    """Every key in the YAML gives the configuration of config.json with that key."""
    known, base = config_class(family), tiny_json(family)
    assert known is not None
    same = 0
    for key in (*known.defaults, *known.synonyms):
        value = another(key, base.get(key, known.default(key)))
        unsaid = key in ("rope_parameters", "rope_theta", "dtype") or key in known.sections
        if unsaid or base.get(key) == value:
            continue
        try:
            real = as_json(CONFIG_MAPPING[family](**with_key(base, known, key, value)))
        except Exception:
            real = None
        try:
            own = as_json(complete_config(model_spec({key: value}, copy.deepcopy(base))))
        except UserError as error:
            assert real is None or names(error, family, key)  # noqa: PT017
            continue
        assert real in (None, own), key
        same += 1
    assert same > 5


A_FEW = ["gpt2", "starcoder2", "falcon", "mpt", "smollm3", "bailing_hybrid"]


@pytest.mark.parametrize("family", A_FEW)
def test_keys_of_a_module(family: str) -> None:
    check_module(family)


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in TRANSFORMERS_MODULES if f not in A_FEW])
def test_keys_of_the_other_modules(family: str) -> None:
    check_module(family)


def test_unknown_keys_of_a_module_are_named_once() -> None:
    config = tiny_json("gpt2") | {"n_ctx": 64, "sliding_window": 8, "torch_dtype": "float32"}
    assert model_spec({}, config).notes == (
        "config.json: n_ctx, sliding_window: GPT2Config has no such key",
    )


def test_rope_settings_that_are_not_a_map() -> None:
    for family in ("llama", "phi"):
        with pytest.raises(ModelConfigError) as raised:
            model_spec({}, tiny_json(family) | {"rope_scaling": "linear"})
        assert str(raised.value).startswith("config.json: rope_scaling = 'linear': must be a map")


def test_a_model_without_shared_experts(tmp_path: Path) -> None:
    """transformers saves matrices without rows for them."""
    config = tiny_json("deepseek_v3") | {"n_shared_experts": 0}
    expected = module_of(config, tmp_path)
    assert expected is not None
    spec = model_spec({}, config)
    with torch.no_grad():
        own = loaded(spec, tmp_path)(expected[0])
    torch.testing.assert_close(own, expected[1], rtol=1e-5, atol=1e-5)
