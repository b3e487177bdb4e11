"""Rules about adapters and frozen parameters; each problem at its key, with what is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import rules
from launcher.config.pet import lora_of
from launcher.config.printing import to_yaml
from launcher.config.resolve import resolve
from models.lora_config import LoraConfig
from tests.config.workspace import RIGHT

MOE = RIGHT.replace(
    "type: Qwen3Config",
    "type: Qwen3MoeConfig\n    num_experts: 4\n    num_experts_per_tok: 2\n"
    "    moe_intermediate_size: 16",
)


def found(more: str, config: str = RIGHT, mode: str = "train") -> tuple[list[str], Any]:
    """Everything wrong with the right configuration and these lines, and the configuration."""
    Path("x.yaml").write_text(config + more)
    result = resolve("x.yaml", mode, {}, ())
    rest = rules.check(result.config, result.provenance, world=1, bad_keys=result.bad_keys)
    return [str(problem) for problem in (*result.problems, *rest)], result.config


RIGHT_ONES = {
    "": None,
    "pet_config: {pet_type: null}\n": None,
    "pet_config: {}\n": None,
    "pet_config: {lora_rank: 4}\n": LoraConfig(rank=4, alpha=16.0),
    "pet_config: {pet_type: dora, target_modules: [q_proj, mlp.up_proj]}\n": LoraConfig(
        rank=8, alpha=16.0, use_dora=True, target_modules=("q_proj", "mlp.up_proj")
    ),
    "pet_config: {target_modules: '.*(q|v)_proj', exclude_layers: [layers.0.self_attn.q_proj]}\n":
        LoraConfig(rank=8, alpha=16.0, target_modules=".*(q|v)_proj",
                   exclude_modules=("layers.0.self_attn.q_proj",)),
    "pet_config: {modules_to_save: [lm_head, norm], layers_to_transform: [1]}\n": LoraConfig(
        rank=8, alpha=16.0, modules_to_save=("lm_head", "norm"), layers=(1,)
    ),
    "pet_config: {lora_rank: 2, modules_to_save: [mlp]}\nfreeze: [lora_A]\n": LoraConfig(
        rank=2, alpha=16.0, modules_to_save=("mlp",)
    ),
    "pet_config: {lora_rank: 2, rank_pattern: {q_proj: 4}, alpha_pattern: {q_proj: 1}}\n":
        LoraConfig(rank=2, alpha=16.0, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1}),
}  # fmt: skip


@pytest.mark.parametrize("more", RIGHT_ONES)
def test_what_is_right(more: str, workspace: Path) -> None:
    problems, config = found(more)
    assert problems == []
    assert lora_of(config) == RIGHT_ONES[more]


@pytest.mark.parametrize("more", RIGHT_ONES)
def test_what_is_printed_is_the_same_configuration(more: str, workspace: Path) -> None:
    _, config = found(more)
    first = resolve("x.yaml", "train", {}, ())
    Path("y.yaml").write_text(to_yaml(first.config, first.provenance))
    assert resolve("y.yaml", "train", {}, ()).config == config


def test_the_section_may_be_in_model_config_too(workspace: Path) -> None:
    below = "    pet_config:\n      pet_type: lora\n      lora_rank: 3\n"
    text = RIGHT.replace("    vocab_size: 64\n", f"    vocab_size: 64\n{below}")
    problems, config = found("", text)
    assert problems == []
    assert lora_of(config) == LoraConfig(rank=3, alpha=16.0)


WRONG = {
    "pet_config: {target_modules: [q_porj]}\n": ("target_modules: q_porj", "q_proj"),
    "pet_config: {target_modules: [wq, q_proj]}\n": ("target_modules: wq", "q_proj"),
    "pet_config: {target_modules: 'q_proj'}\n": ("target_modules: q_proj", "q_proj"),
    "pet_config: {target_modules: '(q_proj'}\n": ("target_modules", "regular expression"),
    "pet_config: {target_modules: [lm_head], exclude_modules: [lm_head]}\n":
        ("exclude_modules", "q_proj"),
    "pet_config: {modules_to_save: [embed_token]}\n": ("embed_token", "embed_tokens"),
    "pet_config: {layers_to_transform: [7]}\n": ("layers_to_transform", "0 to 1"),
    "pet_config: {lora_rank: 0}\n": ("lora_rank", "1"),
    "pet_config: {target_modules: 'q_proj, v_proj'}\n": ("target_modules", "[q_proj, v_proj]"),
    "pet_config: {target_modules: all}\n": ("target_modules: all", "all-linear"),
    "pet_config: {target_modules: [embed_tokens]}\n": ("embed_tokens", "modules_to_save"),
    "pet_config: {target_modules: [q_proj], modules_to_save: [self_attn]}\n":
        ("modules_to_save", "no layer"),
    "pet_config: {layers_to_transform: []}\n": ("layers_to_transform", "no layer"),
    "pet_config: {exclude_modules: [q_porj]}\n": ("exclude_modules: q_porj", "q_proj"),
    "pet_config: {rank_pattern: {q_porj: 2}}\n": ("rank_pattern: q_porj", "q_proj"),
    "pet_config: {rank_pattern: {q_proj: 0}}\n": ("rank_pattern: q_proj: 0", "above 0"),
    "pet_config: {alpha_pattern: {q_proj: -1}}\n": ("alpha_pattern: q_proj: -1", "above 0"),
    "pet_config: {alpha_pattern: {'(q_proj': 2}}\n": ("alpha_pattern", "regular expression"),
    "pet_config: {pet_type: dora, use_dora: False}\n": ("use_dora", "dora"),
    "pet_config: {layers: [0]}\n": ("layers", "pet_config.layers_to_transform"),
    "pet_config: {lora_rank: 2, modules_to_save: [norm]}\nfreeze: [norm]\n":
        ("freeze", "modules_to_save"),
    "pet_config: {lora_rank: 2}\nfreeze: ['.*lora.*']\n": ("freeze", "all parameters"),
    "freeze: ['*embed*']\n": ("freeze: *embed*", ".*embed.*"),
    "pet_config: {lora_r: 4}\n": ("lora_r", "pet_config.lora_rank"),
    "pet_config: {pet_type: qlora}\n": ("pet_type", "lora"),
    "pet_config: {pet_type: ptuning2}\n": ("pet_type", "not built"),
    "peft_config: {r: 4}\n": ("peft_config", "pet_config"),
    "adapter: lora\n": ("adapter", "pet_config.pet_type"),
    "lora_r: 8\n": ("lora_r", "pet_config.lora_rank"),
    "lora_target: all\n": ("lora_target", "pet_config.target_modules"),
    "freeze: [embed_token]\n": ("freeze: embed_token", "embed_tokens"),
    "freeze: ['.*']\n": ("freeze", "all parameters"),
    "freeze_parts: [norm]\n": ("freeze_parts", "freeze"),
}  # fmt: skip


@pytest.mark.parametrize("more", WRONG)
def test_what_is_wrong(more: str, workspace: Path) -> None:
    key, word = WRONG[more]
    problems, _ = found(more)
    assert len(problems) == 1, problems
    line = RIGHT.count("\n") + 1 + ("\nfreeze" in more)
    assert f"x.yaml:{line}" in problems[0]
    assert key in problems[0]
    assert word in problems[0]


TIED = RIGHT.replace("    vocab_size: 64\n", "    vocab_size: 64\n    tie_word_embeddings: True\n")


@pytest.mark.parametrize("key", ["modules_to_save", "target_modules"])
def test_a_tied_head_is_no_module(key: str, workspace: Path) -> None:
    assert found(f"pet_config: {{{key}: [lm_head]}}\n")[0] == []
    problems, _ = found(f"pet_config: {{{key}: [lm_head]}}\n", TIED)
    assert len(problems) == 1, problems
    assert f"pet_config.{key}: lm_head" in problems[0]


EXPERTS = {
    "pet_config: {target_modules: [gate_proj], lora_dropout: 0.1}\n": "lora_dropout",
    "pet_config: {target_modules: [gate_proj], pet_type: dora}\n": "pet_type",
    "pet_config: {target_modules: [gate_proj], use_dora: True}\n": "use_dora",
    "pet_config: {lora_dropout: 0.1, pet_type: dora}\n": "",
    "pet_config: {target_modules: [experts.0.gate_proj, q_proj]}\n": "",
}


@pytest.mark.parametrize("more", EXPERTS)
def test_adapters_of_experts(more: str, workspace: Path) -> None:
    problems, _ = found(more, MOE)
    assert len(problems) == bool(EXPERTS[more]), problems
    assert not problems or f"pet_config.{EXPERTS[more]}" in problems[0]


REFUSED = {
    "load_in_4bit: true\n": ["load_in_4bit", "bfloat16"],
    "load_in_8bit: true\n": ["load_in_8bit", "bfloat16"],
    "quantization_bit: 4\n": ["quantization_bit", "bfloat16"],
    "pet_config: {pet_type: qlora}\n": ["pet_config.pet_type", "qlora"],
    "pet_config: {load_adapter: nowhere}\n": ["pet_config.load_adapter", "nowhere"],
    "pet_config: {load_adapter: other}\n": ["adapter_config.json", "peft_type"],
    "pet_config: {load_adapter: fitting, lora_rank: 8, lora_alpha: 3}\n": [
        "pet_config.lora_rank = 8", "r = 2", "pet_config.lora_alpha = 3", "lora_alpha = 6",
    ],
    "pet_config: {load_adapter: fitting, target_modules: [k_proj]}\n": [
        "pet_config.target_modules", "q_proj",
    ],
    "load_checkpoint: other\npet_config: {load_adapter: fitting}\n": [
        "load_checkpoint = 'other'", "pet_config.load_adapter",
    ],
    "pet_config: {load_adapter: fitting, pet_type: null}\n": ["pet_config.pet_type", "merge_lora"],
}  # fmt: skip


@pytest.mark.parametrize("more", REFUSED)
def test_adapters_on_disk_and_bits(more: str, workspace: Path) -> None:
    for name, content in {"other": {"peft_type": "IA3"}, "fitting": PEFT}.items():
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps(content))
    problems, _ = found(more)
    for word in REFUSED[more]:
        assert any(word in problem for problem in problems), problems
    problems, _ = found("load_in_4bit: false\npet_config: {load_adapter: fitting, lora_rank: 2}\n")
    assert problems == []


PEFT = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2, "lora_alpha": 6}
