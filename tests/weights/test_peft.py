"""Adapters in the form of PEFT: what is written opens in `peft` with the same logits, and what
`peft` writes is read with the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.errors import UserError
from launcher.weights.adapters.config import checked, read_config, unknown_fields
from launcher.weights.adapters.found import Base, FoundAdapter
from launcher.weights.adapters.peft_files import open_peft, write_peft
from launcher.weights.adapters.tensors import read_tensors
from launcher.weights.offline.adapter import OpenAdapter, merge_adapter
from tests.models.tiny import GLM, dense_spec, experts_spec, module_spec
from tests.weights.peft_models import IDS, Adapted, adapted

QWEN = {"type": "Qwen3Config", "head_dim": 24}
TIED = {**QWEN, "tie_word_embeddings": True}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (lambda: dense_spec(**QWEN), {"target_modules": ("q_proj", "down_proj")}),
    "dora, rank-stabilized, some layers": (
        lambda: dense_spec(type="LlamaConfig"),
        {"use_dora": True, "use_rslora": True, "layers": (0, 2)},
    ),
    "ranks by pattern": (
        lambda: dense_spec(type="Qwen2Config"),
        {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
         "alpha_pattern": {"down_proj": 1.5}},
    ),
    "tied embeddings in full": (lambda: dense_spec(**TIED), {"modules_to_save": ("embed_tokens",)}),
    "head and norms in full": (
        lambda: dense_spec(type="LlamaConfig"), {"modules_to_save": ("lm_head", "norm")}
    ),
    "attention of a mixture": (
        lambda: experts_spec("qwen3_moe"), {"target_modules": ("q_proj", "o_proj")}
    ),
    "experts": (
        lambda: experts_spec("mixtral"), {"target_modules": ("w1", "w2", "w3", "v_proj")}
    ),
    "experts of another family": (
        lambda: experts_spec("qwen3_moe", mlp_only_layers=[]),
        {"target_modules": ("gate_proj", "up_proj", "down_proj", "q_proj")},
    ),
    "gate and up in one module": (lambda: dense_spec(**GLM["glm"]), {"use_dora": True}),
    "gate alone of the two": (
        lambda: dense_spec(**GLM["glm4"]), {"target_modules": ("gate_proj", "k_proj")}
    ),
    "gate and up of other ranks": (
        lambda: dense_spec(**GLM["glm4"]),
        {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True},
    ),
    "transposed weights": (lambda: module_spec("gpt2"), {"use_dora": True}),
    "a module of transformers": (lambda: module_spec("gemma2"), {}),
}  # fmt: skip


def in_peft(case: Adapted, directory: Path) -> Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(case.base_copy(), directory).eval()
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_opens_in_peft_with_the_same_logits(name: str, tmp_path: Path) -> None:
    make, lora = CASES[name]
    case = adapted(make(), **lora)
    directory = tmp_path / "adapter"
    directory.mkdir()
    source = case.source(tmp_path)
    write_peft(source, case.config, case.spec.family, directory, case.tied)
    expected = case.logits(IDS)
    with torch.no_grad():
        assert not torch.allclose(case.base(IDS).logits, expected, atol=1e-2)
    torch.testing.assert_close(in_peft(case, directory), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if "gate" not in name])
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    make, lora = CASES[name]
    case = adapted(make(), **lora)
    write_peft(case.source(tmp_path), case.config, case.spec.family, tmp_path, case.tied)
    found = read_tensors(open_peft(tmp_path, case.spec.family), lambda _: True)
    saved = case.saved()
    saved |= {alias: saved[own] for alias, own in case.tied.items()}
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(torch.from_numpy(found[key].numbers), tensor), key


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_peft(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make, lora = CASES[name]
    case = adapted(make(), **lora)
    directory, base, merged = (tmp_path / part for part in ("adapter", "base", "merged"))
    directory.mkdir()
    write_peft(case.source(tmp_path), case.config, case.spec.family, directory, case.tied)
    case.base_copy().save_pretrained(base)
    merge_adapter(directory, merged, base=base)
    found = AutoModelForCausalLM.from_pretrained(merged).eval()
    with torch.no_grad():
        logits = found(IDS).logits
    torch.testing.assert_close(logits, case.logits(IDS), rtol=1e-4, atol=1e-4)
    theirs = PeftModel.from_pretrained(case.base_copy(), directory).merge_and_unload().state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(found.state_dict()[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


def test_what_peft_would_compute_otherwise_is_said(tmp_path: Path) -> None:
    case = adapted(experts_spec("qwen3_moe"))  # a layer without experts
    source = case.source(tmp_path)
    base = Base(path="base")
    found = FoundAdapter(
        path=tmp_path, file=tmp_path, is_peft=False, config=case.config, base=base
    )  # fmt: skip
    warning = OpenAdapter(found, source, case.spec.family, has_experts=True).warning
    assert "model.layers.1.mlp.down_proj" in warning
    assert not OpenAdapter(found, source, case.spec.family).warning
    write_peft(source, case.config, case.spec.family, tmp_path)
    assert not torch.allclose(in_peft(case, tmp_path), case.logits(IDS), atol=1e-2)


WRONG = {
    '{"peft_type": "IA3"}': ["peft_type", "IA3", "LORA", "target_modules"],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 0}': ["r = 0"],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "r": "8"}': ["r = '8'"],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "bias": "all"}': ["bias", "'all'"],
    '{"peft_type": "LORA", "target_modules": [], "target_parameters": ["experts"]}': [
        "target_parameters", "experts",
    ],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "trainable_token_indices": [1]}': [
        "trainable_token_indices"
    ],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "megatron_config": {"a": 1}}': [
        "megatron_config"
    ],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}': [
        "init_lora_weights", "pissa_niter_4",
    ],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {"(": 2}}': [
        "rank_pattern", "(",
    ],
    '{"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {"a": "b"}}': [
        "rank_pattern", "'b'",
    ],
    '{"peft_type": "LORA", "target_modules": "(q_proj"}': ["target_modules", "regular expression"],
    '{"peft_type": "LORA", "target_modules": ["a"], "exclude_modules": "(b"}': ["exclude_modules"],
    '{"peft_type": "LORA", "target_modules": ["a"], "lora_alpha": NaN}': ["lora_alpha", "finite"],
    '{"peft_type": "LORA", "target_modules": ["a"], "lora_dropout": 2}': ["lora_dropout = 2"],
    '{"peft_type": "LORA", "target_modules": ["a"], "layers_to_transform": [-1]}': [
        "layers_to_transform", "from 0",
    ],
    '{"peft_type": "LORA", "target_modules": ["a"], "rank_pattern": {"a": 2.5}}': ["rank_pattern"],
    "[]": ["adapter_config.json"],
    '{"peft_type": "LORA",\n': ["adapter_config.json:2"],
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_descriptions_that_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        checked(read_config(file), str(file))
    for word in WRONG[text]:
        assert word in str(raised.value)
    assert str(file) in str(raised.value)


def test_fields_of_older_and_newer_versions() -> None:
    old = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8,
           "fan_in_fan_out": False, "base_model_name_or_path": "x", "bias": "none"}  # fmt: skip
    assert checked(old, "x")["use_dora"] is False
    assert checked({**old, "new": None, "newer": 3}, "x")["r"] == 4
    assert unknown_fields({**old, "new": None, "newer": 3}) == ["newer"]
    from peft import LoraConfig as Theirs

    assert unknown_fields(Theirs(r=4, target_modules=["q_proj"]).to_dict()) == []


def test_a_file_of_torch(tmp_path: Path) -> None:
    case = adapted(dense_spec(**QWEN), target_modules=("q_proj",))
    torch.save(
        {f"base_model.model.{name}": t.clone() for name, t in case.saved().items()},
        tmp_path / "adapter_model.bin",
    )
    found = read_tensors(open_peft(tmp_path, "qwen3"), lambda _: True)
    for key, tensor in case.saved().items():
        assert torch.equal(torch.from_numpy(found[key].numbers), tensor), key


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        open_peft(tmp_path, "qwen3")
    for name, word in {
        "model.q_proj.lora_A.weight": "base_model",
        "base_model.model.embed_tokens.lora_embedding_A": "modules_to_save",
    }.items():
        save_file({name: torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError) as raised:
            open_peft(tmp_path, "qwen3")
        assert name in str(raised.value)
        assert word in str(raised.value)


@pytest.mark.parametrize("change", [{"r": 3}, {"target_modules": ["k_proj"]}, {"r": 10**12}])
def test_a_description_of_another_adapter(change: dict[str, Any], tmp_path: Path) -> None:
    case = adapted(dense_spec(**QWEN), target_modules=("q_proj",))
    write_peft(case.source(tmp_path), case.config, "qwen3", tmp_path)
    config = checked({**read_config(tmp_path / "adapter_config.json"), **change}, "x")
    with pytest.raises(UserError) as raised:
        open_peft(tmp_path, "qwen3", config)
    assert "adapter_config.json" in str(raised.value)
    assert "q_proj.lora_A.weight" in str(raised.value)


def test_one_matrix_of_two_is_not_merged(tmp_path: Path) -> None:
    case = adapted(dense_spec(**QWEN), target_modules=("q_proj",))
    directory = tmp_path / "adapter"
    directory.mkdir()
    write_peft(case.source(tmp_path), case.config, "qwen3", directory)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, file)
    case.base_copy().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.lora_B"):
        merge_adapter(directory, tmp_path / "merged", base=tmp_path / "base")


def test_a_base_that_does_not_fit_is_not_merged(tmp_path: Path) -> None:
    case = adapted(dense_spec(**QWEN), target_modules=("q_proj",))
    directory, base = tmp_path / "adapter", tmp_path / "base"
    directory.mkdir()
    write_peft(case.source(tmp_path), case.config, "qwen3", directory)
    with pytest.raises(UserError, match="--pretrained_model_dir"):
        merge_adapter(directory, tmp_path / "merged")
    other = adapted(dense_spec(**{**QWEN, "head_dim": 16}), target_modules=("q_proj",))
    other.base_copy().save_pretrained(base)
    with pytest.raises(UserError) as raised:
        merge_adapter(directory, tmp_path / "merged", base=base)
    assert "model.layers.0.self_attn.q_proj.weight" in str(raised.value)
    assert not (tmp_path / "merged").exists()
