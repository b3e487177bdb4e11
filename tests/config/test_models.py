"""Model types at configuration: rows, weights and keys, each mistake with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import rules
from launcher.config.resolve import resolve
from tests.config.weight_files import safetensors

pytestmark = pytest.mark.usefixtures("workspace")


def found(config_json: dict[str, Any], *, weights: bool = True, **changes: Any) -> list[str]:
    """Everything wrong with training the model of `config_json` on some text."""
    Path("m").mkdir(exist_ok=True)
    Path("m/config.json").write_text(json.dumps(config_json))
    Path("m/model.safetensors").unlink(missing_ok=True)
    if weights:
        safetensors(Path("m/model.safetensors"))
    content = {
        "pretrained_model_dir": "m",
        "processor": {"tokenizer": {"pretrained_model_dir": "tokenizer"}},
        "train_dataset": {"data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus"}},
    }
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    Path("x.yaml").write_text(yaml.safe_dump(content))
    result = resolve("x.yaml", "train", {}, [])
    rest = rules.check(result.config, result.provenance, world=1, bad_keys=result.bad_keys)
    return [str(problem) for problem in (*result.problems, *rest)]


ROWS = {
    "gpt2": ({"n_positions": 64}, 64, "n_positions"),
    "openai-gpt": ({"n_positions": 64}, 64, "n_positions"),
    "mpt": ({"max_seq_len": 64}, 64, "max_seq_len"),
    "opt": ({"max_position_embeddings": 64}, 64, "max_position_embeddings"),
    "biogpt": ({"max_position_embeddings": 64}, 64, "max_position_embeddings"),
    "roberta": (
        {"max_position_embeddings": 66, "pad_token_id": 1, "is_decoder": True}, 64,
        "max_position_embeddings = 66",
    ),
    "phi": ({"max_position_embeddings": 64}, 64, "max_position_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("section", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("family", ROWS)
def test_rows_longer_than_the_positions(family: str, section: str) -> None:
    sizes, longest, shown = ROWS[family]
    config = {"model_type": family, "vocab_size": 64} | sizes
    loader = {"data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus"}}
    assert not found(config, **{section: loader | {"seq_length": longest}})
    (problem,) = found(config, **{section: loader | {"seq_length": longest + 1}})
    assert f"{section}.seq_length = {longest + 1}: " in problem
    assert f"({shown}). Nearest: {longest}." in problem


def test_rows_of_models_without_a_limit() -> None:
    rows = {"seq_length": 5000}
    assert not found({"model_type": "bloom", "vocab_size": 64}, train_dataset=rows)
    scaled = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 2048,
              "rope_scaling": {"type": "linear", "factor": 4.0}}  # fmt: skip
    assert not found(scaled, train_dataset=rows)
    assert found(scaled | {"rope_scaling": None}, train_dataset=rows)


def test_models_that_cannot_begin_at_random() -> None:
    config = {"model_type": "falcon_h1", "vocab_size": 64,
              "time_step_limit": [0.0, {"__float__": "Infinity"}]}  # fmt: skip
    assert not found(config)
    (problem,) = found(config, weights=False)
    assert "a falcon_h1 model without weights: " in problem
    (problem,) = found(config, strict_load=False)
    assert "strict_load = False: " in problem
    assert not found({"model_type": "gpt2", "vocab_size": 64}, weights=False)
    unlisted = {"model_type": "a_type_of_tomorrow", "vocab_size": 64}
    (problem,) = found(unlisted)
    assert "transformers has no such model type" in problem


def test_keys_of_a_module_are_checked_before_anything_heavy() -> None:
    config = {"model_type": "gpt2", "vocab_size": 64}
    section = {"layer_norm_epsilon": 1e-3, "rope_theta": 1e4, "n_hed": 4, "hidden_size": 64}
    problems = found(config, model={"model_config": section})
    assert sorted(problem.split(": ", 1)[1] for problem in problems) == [
        "model.model_config.n_hed: GPT2Config has no such key. did you mean `n_head`?",
        "model.model_config.rope_theta: GPT2Config has no such key.",
    ]
    assert all(problem.startswith("x.yaml:") for problem in problems)
