"""Which models see the tokens that they are trained to predict.

Owns the refusal of those: by the keys of config.json that transformers builds its masks from. A
test computes for every model type whether the last token moves the logits before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config_class import ConfigClass
from models.module_table import CAUSAL_WHEN, NOT_CAUSAL_WHEN, TRANSFORMERS_MODULES
from models.spec import Problems

_RULE = "a token would see those after it, which the model is trained to predict"


def check_causal(
    family: str, known: ConfigClass | None, config: Mapping[str, Any],
    written: Mapping[str, str], problems: Problems,
) -> None:  # fmt: skip
    """Problems with a complete config.json of a model that is not causal. `known`: its class where
    it runs through its transformers module."""
    condition = CAUSAL_WHEN.get(family)
    if condition is None and known is not None and family not in TRANSFORMERS_MODULES:
        condition = ("is_decoder", True) if known.has("is_decoder") else None
    if condition is not None and known is not None:
        key, needed = condition
        value = config.get(key, known.default(key))
        if value != needed:
            advice = f"Set model.model_config.{key}: {needed} to train it as a causal model"
            _log(f"model_type {family} with", key, value, written, problems, advice, key in config)
    for key, values in NOT_CAUSAL_WHEN.items():
        value = config.get(key, known.default(key) if known is not None else None)
        if value in values:
            _log("", key, value, written, problems, f"Take {key} out, or give a causal model")


def _log(
    what: str, key: str, value: Any, written: Mapping[str, str], problems: Problems, advice: str,
    is_given: bool = True,
) -> None:  # fmt: skip
    spelled = written.get(key, "")
    place = f"model.model_config.{spelled}" if spelled else f"config.json: {key}"
    text = f"{what} {place if is_given else key} = {value}".strip()
    text += "" if is_given else " (its default)"
    problems.log(text, _RULE, advice=advice, key=spelled)
