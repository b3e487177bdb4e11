"""Weights that do not fit a model: both halves are shown, and what the weights are is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.shard import Shard
from launcher.weights.reading.load import load
from launcher.weights.source import open_complete

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}.weight" for n in range(6)
      for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")),
    "model.norm.weight", "lm_head.weight",
]  # fmt: skip


def said(tmp_path: Path, files: list[str], model: list[str] = NAMES, *, strict: bool = True) -> str:
    """What a load answers."""
    save_file({name: torch.ones(2) for name in files}, tmp_path / "model.safetensors")
    targets = {name: Shard((2,), full_box((2,)), torch.zeros(2)) for name in model}
    with pytest.raises(UserError) as caught:
        load(targets, open_complete(tmp_path), strict=strict)
    assert not any(shard.tensor.any() for shard in targets.values())
    return str(caught.value)


def test_both_halves_are_shown_with_their_counts(tmp_path: Path) -> None:
    text = said(tmp_path, [f"other.{n}" for n in range(30)])
    assert "(27 missing, 30 extra, 0 of another shape or dtype)" in text
    rows = [line.split() for line in text.splitlines()[2:]]
    assert sum("missing" in row and "..." not in row for row in rows) == 10
    assert sum("unknown" in row and "..." not in row for row in rows) == 10
    assert ["...", "and", "17", "more", "missing"] in rows
    assert ["...", "and", "20", "more", "unknown"] in rows
    one = said(tmp_path, [*NAMES[1:], *(f"other.{n}" for n in range(30))])
    assert one.splitlines()[2].split() == [NAMES[0], "missing", "[2]"]
    assert one.splitlines()[-1] == "  ... and 11 more unknown"


@pytest.mark.parametrize("strict", [True, False])
def test_random_weights_are_never_advised(tmp_path: Path, strict: bool) -> None:
    """Where no name fits, strict_load: False would load nothing at all: it is refused too."""
    text = said(tmp_path, ["a.weight", "b.weight"], strict=strict)
    assert "No tensor of the model is in the files: these are weights of another model" in text
    assert "strict_load" not in text
    if strict:
        assert "strict_load: False loads what fits" in said(tmp_path, NAMES[1:])


def inside(part: str) -> Callable[[str], str]:
    return lambda name: name.replace(".self_attn.", f".{part}.self_attn.")


WRAPPED: dict[str, tuple[Callable[[str], str], list[str], str]] = {
    "data parallel": (lambda n: f"module.{n}", [], "`module.` in them, which comes from Distrib"),
    "DeepSpeed twice": (lambda n: f"module.module.{n}", [], "`module.` in them"),
    "compile": (lambda n: f"_orig_mod.{n}", [], "`_orig_mod.` in them, which comes from torch.c"),
    "compiled layers": (inside("_orig_mod"), [], "`_orig_mod.` in them"),
    "both": (lambda n: f"module._orig_mod.{n}", [], "`_orig_mod.` and `module.` in them"),
    "FSDP": (inside("_fsdp_wrapped_module"), [], "FullyShardedDataParallel"),
    "checkpointing": (inside("_checkpoint_wrapped_module"), [], "activation checkpointing"),
    "a multimodal model": (
        lambda n: f"language_model.{n}", ["vision_tower.a", "projector.b"],
        "`language_model.` in them, which comes from a multimodal model, whose language model "
        "this is (2 further tensors belong to other parts)"),
    "a newer one": (lambda n: n.replace("model.", "model.language_model."), ["model.visual.a"],
                    "`language_model.` in them"),
    "PEFT": (lambda n: f"base_model.model.{n}", [], "`base_model.` in them, which comes from PEFT"),
    "PEFT, its layers": (
        lambda n: f"base_model.model.{n.replace('q_proj.', 'q_proj.base_layer.')}", [],
        "`base_layer.` and `base_model.` in them"),
    "the base model in data parallel": (
        lambda n: f"module.{n.removeprefix('model.')}", [], "`module.` in them"),
    "an unknown module": (lambda n: f"thinker.{n}", ["talker.a"],
                          "begin with `thinker.`, of a module around the model (1 further"),
    "Lightning": (lambda n: f"model.{n}", [], "begin with `model.`"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_what_stands_before_all_names_is_named(tmp_path: Path, case: str) -> None:
    rename, others, text = WRAPPED[case]
    answer = said(tmp_path, [*map(rename, NAMES), *others])
    assert text in answer
    name = next(name for name in NAMES if rename(name) != name)
    assert f"`{name}`, not `{rename(name)}`" in answer
    assert "strict_load" not in answer


def test_a_prefix_that_the_files_lack_is_named(tmp_path: Path) -> None:
    model = [f"transformer.h.{n}.w" for n in range(4)] + ["transformer.norm"]
    answer = said(tmp_path, [name.removeprefix("transformer.") for name in model[:-1]], model)
    assert "lack the `transformer.` that those of the model begin with (1 further tensors are" in (
        answer)  # fmt: skip


def test_a_prefix_of_some_names_explains_nothing(tmp_path: Path) -> None:
    answer = said(tmp_path, [*NAMES[:9], *(f"module.{name}" for name in NAMES[9:20])])
    assert "module.` in them" not in answer
    assert "strict_load: False loads what fits" in answer


FOREIGN = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": "an adapter of PEFT (LoRA)",
    "model.layers.0.self_attn.q_proj.qweight": "weights quantized by GPTQ or AWQ",
    "model.layers.0.self_attn.q_proj.weight.absmax": "weights quantized by bitsandbytes",
    "layers.0.attention.wq.weight": "under the names of Meta or Mistral",
    "model.tok_embeddings.embedding_weight": "under names of MindFormers",
    "decoder.layers.0.self_attention.linear_qkv.weight": "under the names of Megatron",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_names_of_other_programs_are_known(tmp_path: Path, name: str) -> None:
    answer = said(tmp_path, [name])
    assert f"They are {'' if 'under' not in FOREIGN[name] else 'weights '}{FOREIGN[name]}" in answer
    assert "strict_load" not in answer
