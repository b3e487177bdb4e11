"""Adapters that PEFT itself writes, with options that only it has: the same logits in a job, and
when they are merged; or a refusal that names what is not the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.builders.job import Job
from launcher.builders.load_weights import find_weights, load_or_init
from launcher.builders.model import build_predicting
from launcher.config import rules
from launcher.config.resolve import resolve
from launcher.errors import UserError
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.world import World
from launcher.report.console import Console
from launcher.weights.offline.adapter import merge_adapter
from models.build import build_model
from models.lora_config import LoraConfig, is_saved, with_adapters
from tests.models.tiny import GLM, dense_spec, module_spec, oracle, tokens

IDS = tokens(2, 9)
QWEN = partial(dense_spec, type="Qwen3Config", head_dim=24)
TIED = partial(QWEN, tie_word_embeddings=True)
FULL = ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
Case = tuple[Callable[[], Any], dict[str, Any]]
SAME: dict[str, Case] = {
    "endings within words": (QWEN, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "modules that are not there": (
        QWEN, {"target_modules": ["v_proj"], "modules_to_save": ["wte", "score"]},
    ),
    "layers inside a module in full": (
        QWEN, {"target_modules": "all-linear", "modules_to_save": ["self_attn"]},
    ),
    "full names in any layer": (QWEN, {"target_modules": FULL, "layers_to_transform": [1]}),
    "no layers are all": (QWEN, {"target_modules": ["o_proj"], "layers_to_transform": []}),
    "the head, and its copy": (QWEN, {"target_modules": ["lm_head", "o_proj"], "use_dora": True}),
    "both ends of a tie": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
         "ensure_weight_tying": True},
    ),
    "a joined module in full": (
        partial(dense_spec, **GLM["glm4"]),
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp.gate_up_proj"]},
    ),
    "transposed weights": (
        partial(module_spec, "gpt2"),
        {"target_modules": r".*\.1\..*c_(attn|fc)", "alpha_pattern": {"c_fc": 3}},
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[Case, str]] = {
    "the embedding alone of a tie": (
        (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        "model.embed_tokens.weight",
    ),
    "the head alone of a tie": (
        (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}), "lm_head.weight",
    ),
    "an end of a tie in transformers": (
        (partial(module_spec, "gpt2"), {"target_modules": ["c_fc"], "modules_to_save": ["wte"]}),
        "transformer.wte.weight",
    ),
}  # fmt: skip


def write(case: Case, folder: Path) -> Tensor:
    """`folder/base` and `folder/adapter` as transformers and PEFT save them. Returns the logits."""
    import peft

    make, options = case
    base: Any = oracle(make())
    base.save_pretrained(folder / "base")
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=6, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder / "adapter")
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def loaded(folder: Path) -> nn.Module:
    """The model of a job that predicts with the adapter."""
    yaml = folder / "run.yaml"
    yaml.write_text(
        f"pretrained_model_dir: {folder}/base\nload_checkpoint: {folder}/adapter\n"
        f"input_data: x\noutput_dir: {folder}/output\ncontext: {{device_target: CPU}}\n"
    )
    found = resolve(str(yaml), "predict", {}, ())
    problems = rules.check(found.config, found.provenance, world=1, bad_keys=found.bad_keys)
    assert not [str(problem) for problem in problems if "tokenizer" not in str(problem)]
    world = World(0, 1, torch.device("cpu"))
    job = Job(found.config, found.provenance, world, Console(enabled=False))
    weights = find_weights(job)
    forward, layout = build_predicting(job)
    model: nn.Module = forward.model  # type: ignore[attr-defined]
    load_or_init(job, ModelParts([model]), layout, weights)
    return model.eval()


@pytest.mark.parametrize("name", SAME)
def test_the_same_logits(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = write(SAME[name], tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path)(IDS), expected, rtol=1e-4, atol=1e-4)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_same_is_refused(name: str, tmp_path: Path) -> None:
    case, word = REFUSED[name]
    write(case, tmp_path)
    for use in (
        lambda: loaded(tmp_path),
        lambda: merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base"),
    ):
        with pytest.raises(UserError) as raised:
            use()
        assert word in str(raised.value)
        assert "ensure_weight_tying" in str(raised.value)
    assert not (tmp_path / "merged").exists()


def test_a_copy_of_another_base_is_refused(tmp_path: Path) -> None:
    write(SAME["the head, and its copy"], tmp_path)
    torch.manual_seed(5)
    other: Any = oracle(QWEN())
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    other.save_pretrained(tmp_path / "base")
    for use in (
        lambda: loaded(tmp_path),
        lambda: merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base"),
    ):
        with pytest.raises(UserError, match=r"lm_head\.weight"):
            use()


def test_an_adapter_of_other_layers_is_named_as_one(tmp_path: Path) -> None:
    write((partial(QWEN, num_layers=4), {"target_modules": ["q_proj"]}), tmp_path)
    oracle(QWEN()).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with pytest.raises(UserError) as raised:
        loaded(tmp_path)
    assert "pretrained_model_dir" in str(raised.value)
    assert "merge_and_unload" not in str(raised.value)


def test_a_checkpoint_with_an_adapter_is_small() -> None:
    """Below 3 % of the base, with both averages of Adam, at the sizes of Qwen3-0.6B."""
    spec = dense_spec(
        type="Qwen3Config", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
        num_layers=28, num_heads=16, n_kv_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    adapted = with_adapters(spec, LoraConfig(rank=8, alpha=16.0), ())
    sizes = {
        name: p.numel() for name, p in build_model(adapted, dtype=torch.bfloat16).named_parameters()
    }
    saved = sum(size for name, size in sizes.items() if is_saved(name, adapted.lora))
    assert 0 < 3 * saved < 0.03 * sum(sizes.values())
