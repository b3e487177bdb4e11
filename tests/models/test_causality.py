"""Models whose attention is not causal: detected by computing, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.errors import UserError
from models import causality, families, transformers_model
from models.build import build_model
from models.families import TRANSFORMERS_MODULES, ModelConfigError, model_spec
from models.module_table import CAUSAL_WHEN
from models.transformers_model import TransformersModel
from tests.models.test_sweep import as_logits, saved_module
from tests.models.tiny import tokens
from tests.models.zoo import tiny_config

OTHERWISE: dict[str, Any] = {"is_decoder": False, "causal": False, "attn_type": "bi"}
A_FEW = ["bert", "xlm", "roberta", "roformer", "xlnet"]


def looks_ahead(model: nn.Module) -> bool:
    """Whether the last token changes the logits before it."""
    input_ids = tokens(2, 12)
    other = input_ids.clone()
    other[:, -1] = other[:, -1] % 90 + 3
    assert not torch.equal(input_ids, other)
    with torch.no_grad():
        before, after = (as_logits(model.eval()(ids))[:, :-1] for ids in (input_ids, other))
    return float((before - after).abs().max()) > 1e-5


def check(family: str, folder: Path) -> None:
    """Causal with the key of the table, not without it; then refused, with the key."""
    key, needed = CAUSAL_WHEN[family]
    assert not looks_ahead(saved_module(family, folder / "causal"))
    other = {key: OTHERWISE[key]}
    assert looks_ahead(saved_module(family, folder / "other", **other))
    for config in ({"model_type": family} | other, {"model_type": family}):
        with pytest.raises(ModelConfigError) as raised:
            model_spec({}, config)
        assert "not causal: a token attends to later ones" in str(raised.value)
        assert f"Set model.model_config.{key}: {needed}" in str(raised.value)
    model_spec({key: needed}, {"model_type": family} | other)


@pytest.mark.parametrize("family", A_FEW)
def test_types_that_are_causal_on_a_condition(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in CAUSAL_WHEN if f not in A_FEW])
def test_the_other_types_on_a_condition(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in TRANSFORMERS_MODULES if f not in CAUSAL_WHEN])
def test_all_other_types_are_causal(family: str, tmp_path: Path) -> None:
    assert not looks_ahead(saved_module(family, tmp_path))


KEYS = {
    "llama": {"is_causal": False},
    "gpt2": {"is_causal": False},
    "gemma3_text": {"use_bidirectional_attention": True},
    "gemma4_text": {"use_bidirectional_attention": "all"},
}


@pytest.mark.parametrize("family", KEYS)
def test_keys_that_disable_the_causal_mask(family: str, tmp_path: Path) -> None:
    assert looks_ahead(with_key(family, tmp_path, **KEYS[family]))
    ((key, value),) = KEYS[family].items()
    with pytest.raises(ModelConfigError) as raised:
        model_spec({}, {"model_type": family, key: value})
    assert str(raised.value).startswith(f"config.json: {key} = {value}: not causal: ")


def with_key(family: str, folder: Path, **key: Any) -> nn.Module:
    """A module whose config has `key`, which the class of its config may lack."""
    config = saved_module(family, folder).config
    config.update(key)
    return AutoModelForCausalLM.from_config(config)


def test_a_key_of_the_yaml_is_reported() -> None:
    with pytest.raises(ModelConfigError) as raised:
        model_spec({"is_decoder": False}, {"model_type": "electra", "is_decoder": True})
    assert raised.value.model_problems[0].key == "is_decoder"
    assert "model.model_config.is_decoder = False" in str(raised.value)


def unlisted(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Make `family` a type that a newer transformers has added."""
    rest = tuple(name for name in TRANSFORMERS_MODULES if name != family)
    for room in (families, causality, transformers_model):
        monkeypatch.setattr(room, "TRANSFORMERS_MODULES", rest)
    monkeypatch.delitem(CAUSAL_WHEN, family, raising=False)


def test_an_unlisted_type_with_is_decoder_is_refused_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unlisted(monkeypatch, "rembert")
    with pytest.raises(ModelConfigError, match="is_decoder = False"):
        model_spec({}, {"model_type": "rembert"})
    model_spec({}, {"model_type": "rembert", "is_decoder": True})


@pytest.mark.parametrize("causal", [True, False])
def test_an_unlisted_type_is_tried_in_its_first_forward(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlisted(monkeypatch, "xlm")
    config = {"model_type": "xlm"} | tiny_config("xlm", causal=causal)
    model = build_model(model_spec({}, config), dtype=torch.float32, device="cpu")
    assert isinstance(model, TransformersModel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.train()
    if not causal:
        with pytest.raises(UserError, match="model type xlm: not causal: a token attends"):
            model(tokens(2, 24))
        return
    assert model(tokens(2, 24)).requires_grad
    assert model.training
