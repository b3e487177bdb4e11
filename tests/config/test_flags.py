"""Every flag of the command line arrives at its keys, typed by the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.command_line import FLAGS
from tests.config.test_resolve import problems, resolved, value

FLAG_VALUES: dict[str, tuple[Any, Any]] = {
    "run_mode": ("finetune", "finetune"),
    "output_dir": ("my out=1", "my out=1"),
    "load_checkpoint": ("/a b/c", "/a b/c"),
    "pretrained_model_dir": ("qwen", "qwen"),
    "auto_trans_ckpt": ("TRUE", True),
    "src_strategy_path_or_dir": ("output/strategy", "output/strategy"),
    "resume_training": ("CKP-1_10.safetensors", "CKP-1_10.safetensors"),
    "transform_process_num": ("2", 2),
    "seed": ("11", 11),
    "only_save_strategy": ("true", True),
    "use_parallel": ("false", False),
    "epochs": ("3", 3),
    "max_steps": ("1e3", 1000),
    "batch_size": ("8", 8),
    "gradient_accumulation_steps": ("2", 2),
    "sink_mode": ("False", False),
    "do_eval": ("true", True),
    "train_dataset_dir": ("{x}", "{x}"),
    "eval_dataset_dir": ("[y]", "[y]"),
    "num_samples": ("5", 5),
    "predict_data": ("a=b, c", "a=b, c"),
    "system": ("be short", "be short"),
    "chat_template": ("none", "none"),
    "tools": ("tools.json", "tools.json"),
    "stream": ("False", False),
    "interactive": ("True", True),
    "predict_batch_size": ("2", 2),
    "do_sample": ("True", True),
    "trust_remote_code": ("true", True),
    "register_path": ("user_callbacks.py", "user_callbacks.py"),
    "profile": ("true", True),
    "mode": ("1", 1),
    "device_id": ("3", 3),
    "device_target": ("CPU", "CPU"),
    "remote_save_url": ("obs://x", "obs://x"),
}
REFUSED_FLAGS = {
    "strategy_load_checkpoint": "x",
    "modal_type": "image",
    "adapter_id": "a",
}
MOVED = {"model.model_config.do_sample": "generation_config.do_sample"}
SECTIONS = "train_dataset: {seq_length: 8}\neval_dataset: {seq_length: 8}\n"


def test_every_flag_is_tried() -> None:
    assert {*FLAG_VALUES, *REFUSED_FLAGS} == set(FLAGS)


@pytest.mark.parametrize("equals", [False, True], ids=["two words", "one word"])
@pytest.mark.parametrize("name", FLAG_VALUES)
def test_every_flag_survives(workspace: Path, name: str, equals: bool) -> None:
    written, expected = FLAG_VALUES[name]
    words = [f"--{name}={written}"] if equals else [f"--{name}", written]
    result = resolved(SECTIONS, *words, run_mode=None)
    for target in FLAGS[name].targets:
        key = MOVED.get(target, target)
        assert value(result, key) == expected
        assert type(value(result, key)) is type(expected)
        assert result.provenance.where(key) == f"command line: --{name}"


@pytest.mark.parametrize("name", REFUSED_FLAGS)
def test_flags_not_built_yet_arrive_too(workspace: Path, name: str) -> None:
    (found,) = problems("", f"--{name}", REFUSED_FLAGS[name], run_mode=None)
    assert found.startswith(f"command line: --{name}: {FLAGS[name].targets[0]} = ")
    assert "not built yet" in found


@pytest.mark.parametrize("name", ["train_dataset", "train_data"])
def test_abbreviations_of_the_original(workspace: Path, name: str) -> None:
    result = resolved("", f"--{name}", "corpus")
    assert result.config.train_dataset is not None
    assert result.config.train_dataset.data_loader.paths == ["corpus"]


def test_num_samples_makes_no_sections(workspace: Path) -> None:
    assert resolved("", num_samples=3).config.train_dataset is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["one"], "one"),
        (["a\\nb"], "a\nb"),
        (["I love Beijing, because", "two=2"], ["I love Beijing, because", "two=2"]),
        (["123"], "123"),
        (["true"], "true"),
        (["${x}"], "${x}"),
    ],
)
def test_prompts(workspace: Path, words: list[str], expected: Any) -> None:
    result = resolved("", "--predict_data", *words, "--seed", "3")
    assert result.config.input_data == expected
    assert result.config.seed == 3


@pytest.mark.parametrize(
    ("words", "prompts", "top_k"),
    [
        (["a", "b", "generation.top_k=3"], ["a", "b"], 3),
        (["a", "generation_config.top_k=3", "b"], ["a", "b"], 3),
        (["a", "top_k=3"], "a", 3),
        (["a", "+model.model_config.top_k=3"], "a", 3),
        (["top_k=3"], "top_k=3", 50),
        (["a", "x=3"], ["a", "x=3"], 50),
    ],
)
def test_keys_among_prompts(workspace: Path, words: list[str], prompts: Any, top_k: int) -> None:
    """A known key after the first prompt is an override; anything else is a prompt."""
    config = resolved("", "--predict_data", *words).config
    assert (config.input_data, config.generation_config.top_k) == (prompts, top_k)


def test_trust_is_given_on_the_command_line_only(workspace: Path) -> None:
    assert resolved("", "--trust_remote_code", "true").config.trust_remote_code
    assert resolved("trust_remote_code: False\n").config.trust_remote_code is False
    (found,) = problems("trust_remote_code: True\n")
    assert "--trust_remote_code true" in found
