"""Rejection of models that are not causal: attention would include the tokens to predict.

Decided by the keys of config.json from which transformers builds its masks. A test computes for
every model type whether the last token changes the logits before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config_class import ConfigClass
from models.module_table import CAUSAL_WHEN, NOT_CAUSAL_WHEN, TRANSFORMERS_MODULES
from models.spec import Problems

_RULE = "not causal: a token attends to later ones, which training predicts"


def check_causal(
    family: str, known: ConfigClass | None, config: Mapping[str, Any],
    written: Mapping[str, str], problems: Problems,
) -> None:  # fmt: skip
    """Add problems with the complete config.json of a model that is not causal. `known`: its
    configuration class, if it runs through its transformers module."""
    condition = CAUSAL_WHEN.get(family)
    if condition is None and known is not None and family not in TRANSFORMERS_MODULES:
        condition = ("is_decoder", True) if known.has("is_decoder") else None
    if condition is not None and known is not None:
        key, needed = condition
        value = config.get(key, known.default(key))
        if value != needed:
            advice = f"Set model.model_config.{key}: {needed} to train a causal model"
            _log(f"model_type {family} with", key, value, written, problems, advice, key in config)
    for key, values in NOT_CAUSAL_WHEN.items():
        value = config.get(key, known.default(key) if known is not None else None)
        if value in values:
            _log("", key, value, written, problems, f"Remove {key}, or use a causal model")


def _log(
    what: str, key: str, value: Any, written: Mapping[str, str], problems: Problems, advice: str,
    is_given: bool = True,
) -> None:  # fmt: skip
    spelled = written.get(key, "")
    place = f"model.model_config.{spelled}" if spelled else f"config.json: {key}"
    text = f"{what} {place if is_given else key} = {value}".strip()
    text += "" if is_given else " (its default)"
    problems.log(text, _RULE, advice=advice, key=spelled)
