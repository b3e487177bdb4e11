"""config.json and YAML with wrong values anywhere: a model or an error, never a traceback."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest

from models.families import DECODERS, TRANSFORMERS_MODULES, ModelConfigError, model_spec
from models.positions import position_limit, row_length
from tests.models.test_config_fields import tiny_json

VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 10**400, 1.5, math.inf, math.nan, "", "abc", "64", [], [1], {},
    {"a": 1}, ["full_attention"], [[1, 2], {}], {"type": 5}, {"__float__": "Infinity"},
    {"__float__": []}, {"rope_type": "linear", "factor": math.inf}, {"rope_type": ["x"]},
    {"rope_type": "yarn", "factor": "x"}, {"rope_type": "dynamic"},
    {"full_attention": {"rope_type": "yarn"}}, {"full_attention": 3},
]  # fmt: skip
KEYS = [
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "is_causal",
    "use_bidirectional_attention", "text_config", "model_type", "quantization_config",
    "per_layer_config", "layer_types", "num_experts", "original_max_position_embeddings",
    "num_nextn_predict_layers", "is_decoder", "pad_token_id", "hidden_dropout", "torch_dtype",
    "max_position_embeddings", "seq_length", "theta", "head_dim",
]  # fmt: skip
FAMILIES = [*DECODERS, *TRANSFORMERS_MODULES]


def try_mutations(count: int, seed: int, families: list[str]) -> int:
    """Describe `count` models with wrong values; returns how many were refused."""
    random_ = random.Random(seed)
    right, refused = {family: tiny_json(family) for family in families}, 0
    for _ in range(count):
        config, written = copy.deepcopy(right[random_.choice(families)]), {}
        for _ in range(random_.randint(1, 3)):
            key = random_.choice([random_.choice(list(config)), random_.choice(KEYS)])
            target = random_.choice([config, written])
            target[key] = copy.deepcopy(random_.choice(VALUES))
        config.pop(random_.choice(list(config)), None)
        try:
            spec = model_spec(written, config)
        except ModelConfigError:
            refused += 1
        else:
            position_limit(spec.family, spec.hf_config)
            assert row_length(spec.family, spec.hf_config) > 0
    return refused


def test_mutations() -> None:
    families = [*DECODERS, "gpt2", "gpt_neox", "gemma3_text", "roberta", "mpt", "olmoe"]
    assert 200 < try_mutations(600, 15, families) < 600


@pytest.mark.long
def test_many_mutations() -> None:
    assert 4000 < try_mutations(10000, 16, FAMILIES) < 9000
