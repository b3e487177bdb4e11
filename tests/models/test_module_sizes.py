"""Invalid sizes, in config.json of a transformers module or overridden in the YAML."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.build import build_model
from models.families import ModelConfigError, model_spec
from tests.models.test_config_fields import tiny_json

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "key/value heads": ("olmo2", {"num_key_value_heads": 3}, "num_key_value_heads = 3: "),
    "more groups than heads": ("granite", {"num_key_value_heads": 8}, "num_key_value_heads = 8: "),
    "no heads": ("bloom", {"n_head": 0}, "n_head = 0: must be an integer of at least 1"),
    "a text": ("gpt2", {"n_embd": "32"}, "n_embd = '32': must be an integer of at least 1"),
    "a boolean": ("gpt_neox", {"num_hidden_layers": True}, "num_hidden_layers = True: "),
    "a fraction": ("opt", {"hidden_size": 32.5}, "hidden_size = 32.5: must be an integer"),
    "experts": ("olmoe", {"num_experts_per_tok": 99}, "num_experts_per_tok = 99: there are "),
    "local experts": ("phimoe", {"num_experts_per_tok": 99}, "num_experts_per_tok = 99: there "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_invalid_sizes_are_refused_by_name(case: str) -> None:
    family, change, says = WRONG[case]
    base = tiny_json(family)
    for config, written in ((base | change, {}), (base, change)):
        with pytest.raises(ModelConfigError) as caught:
            model_spec(written, config)
        assert says in str(caught.value), str(caught.value)
        where = "model.model_config." if written else "config.json: "
        assert where in str(caught.value)


@pytest.mark.parametrize("case", ["key/value heads", "experts"])
def test_what_is_refused_would_fail_in_the_first_forward_pass(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, change, _ = WRONG[case]
    monkeypatch.setattr("models.module_config.ModuleSizes.run", lambda self: None)
    spec = model_spec({}, tiny_json(family) | change)
    with pytest.raises(Exception):  # noqa: B017 - whichever operation it comes to first
        build_model(spec, dtype=torch.float32, device="cpu")(torch.tensor([[1, 2, 3]]))
