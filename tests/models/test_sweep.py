"""Every causal model type of transformers: the same results, or refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from launcher.tools import model_docs
from models.families import TRANSFORMERS_MODULES, UNSUPPORTED, ModelConfigError
from models.families import model_spec as describe
from models.transformers_model import TransformersModel
from tests.models.test_tensor_mapping import loaded
from tests.models.tiny import IN_TRANSFORMERS, gradients_of, tokens
from tests.models.zoo import tiny_config

WORKING = [*IN_TRANSFORMERS, *TRANSFORMERS_MODULES]
ALWAYS = ["bamba", "camembert", "falcon_h1", "xlm-roberta"]
"""Infinity in config.json; heads tied to modules that are created after them."""
SAMPLE = ALWAYS + random.Random(15).sample([f for f in WORKING if f not in ALWAYS], 12)


def saved_module(family: str, folder: Path, **changes: Any) -> nn.Module:
    """A tiny module of `family`, norms and biases not constant, saved into `folder`."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**tiny_config(family, **changes))
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter) or name.endswith("correction_bias"):
                tensor.add_(torch.randn_like(tensor) * 0.05)
    module.save_pretrained(folder)
    return module


def loss_of(logits: Tensor, input_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


def check(family: str, folder: Path) -> None:
    module = saved_module(family, folder)
    spec = describe({}, json.loads((folder / "config.json").read_text()))
    own = loaded(spec, folder)
    input_ids = tokens(2, 24)
    with torch.no_grad():
        expected = module.eval()(input_ids, use_cache=False).logits
        torch.testing.assert_close(own(input_ids), expected, rtol=1e-5, atol=1e-5)
    losses = []
    for model in (own.train(), module.train()):
        torch.manual_seed(3)  # of dropout
        losses.append(loss_of(as_logits(model(input_ids)), input_ids))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    of_own = {name: p.grad for name, p in own.named_parameters()}
    of_module = {name: p.grad for name, p in module.named_parameters()}
    if not isinstance(own, TransformersModel):
        of_module = gradients_of(module, own)
    assert of_own.keys() == of_module.keys()
    for name, gradient in of_own.items():
        assert (gradient is None) == (of_module[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, of_module[name], rtol=1e-3, atol=1e-5)
    if isinstance(own, TransformersModel):
        check_generation(own, module, input_ids)


def check_generation(own: TransformersModel, module: nn.Module, input_ids: Tensor) -> None:
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    own.eval()
    texts = [
        model.generate(input_ids[:1, :8], **asked).tolist()
        for model in (own.wrapped, module.eval())
    ]
    assert texts[0] == texts[1]


def as_logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("family", SAMPLE)
def test_a_model_type_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in WORKING if f not in SAMPLE])
def test_the_other_model_types_compute_what_transformers_does(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.parametrize("family", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*WORKING}))
def test_the_rest_is_refused_by_name(family: str) -> None:
    with pytest.raises(ModelConfigError) as raised:
        describe({}, {"model_type": family})
    reason = f"config.json: model_type = {family} needs {UNSUPPORTED[family]}: not built yet."
    assert str(raised.value).startswith(reason)


def test_the_page_of_models_is_current() -> None:
    written = model_docs.PAGE.read_text(encoding="utf-8")
    assert written == model_docs.render(), "run: python -m launcher.tools.model_docs"
