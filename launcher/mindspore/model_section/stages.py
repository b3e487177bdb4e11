"""Layers of pipeline stages: `offset` and `pp_interleave_num`.

Owns which of their values ask for nothing under the pipeline degree of the run. What they mean
otherwise is in `launcher.config.derived`.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section.keys import SECTION, ModelKeys, value_of
from launcher.mindspore.sections.values import is_of_mindformers

_INTERLEAVE = "parallel.pipeline_config.pipeline_interleave"


def translate(keys: ModelKeys) -> None:
    """Drop an even `offset` of another pipeline degree, and interleaving of one stage a rank."""
    _even_offset(keys)
    number = keys.value("pp_interleave_num")
    is_on = value_of(keys.draft.find(_INTERLEAVE))
    if number == 1 and is_on is True and is_of_mindformers(keys.draft):
        why = "each rank has one stage: pp_interleave_num is 1"
        keys.draft.replace(_INTERLEAVE, {_INTERLEAVE: False}, why)


def _even_offset(keys: ModelKeys) -> None:
    """An `offset` of zeros for another pipeline degree asks for even stages."""
    name = "offset"
    node = keys.draft.find(f"{SECTION}.{name}")
    stages = value_of(keys.draft.find("parallel_config.pipeline_stage"))
    if node is None or keys.is_own(name):
        return
    value = keys.value(name)
    if value is None or (isinstance(value, list) and _zeros(value) and _another(value, stages)):
        keys.drop(name, "every stage has an even share of the layers")


def _zeros(value: list[Any]) -> bool:
    return all(_zeros(item) if isinstance(item, list) else item == 0 for item in value)


def _another(value: list[Any], stages: Any) -> bool:
    row = value[0] if value and isinstance(value[0], list) else value
    return not isinstance(row, list) or len(row) != (stages or 1)
