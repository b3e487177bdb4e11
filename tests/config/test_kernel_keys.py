"""The keys about kernels and memory of GPUs: values, and words of other tools."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from launcher.config.resolve import read_tree
from launcher.config.yaml_reader import read_text
from tests.config.test_rules import found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "auto"),
        ("deterministic: auto\n", "auto"),
        ("deterministic: true\n", True),
        ("deterministic: False\n", False),
    ],
)
def test_deterministic(text: str, expected: bool | str) -> None:
    resolved = read_tree(read_text(f"run_mode: train\n{text}", "x.yaml"))
    assert not resolved.problems
    assert resolved.config.deterministic is expected or resolved.config.deterministic == expected


@pytest.mark.parametrize(
    ("text", "where", "nearest"),
    [
        ("deterministic: strict", "x.yaml:1", "True"),
        ("deterministic: warn", "x.yaml:1", "auto"),
        ("deterministic: atuo", "x.yaml:1", "auto"),
        ("full_determinism: True", "x.yaml:1", "deterministic"),  # Trainer, LLaMA-Factory
        ("deterministic_mode: True", "x.yaml:1", "deterministic"),  # Megatron-LM
        ("use_deterministic_algorithms: True", "x.yaml:1", "deterministic"),  # torch
        ("gc_steps: 100", "x.yaml:1", "gc_freq"),  # axolotl
        ("manual_gc_interval: 100", "x.yaml:1", "gc_freq"),  # Megatron-LM
        ("deterministic_warn_only: True", "x.yaml:1", "deterministic"),  # torchtitan
        ("PYTORCH_CUDA_ALLOC_CONF: 'expandable_segments:True'", "x.yaml:1", "expandable_segments"),
        ("gc_freq: -1", "x.yaml:1", "0"),
        ("compile: 'off'", "x.yaml:1", "False"),
        ("compile: 'yes'", "x.yaml:1", "True"),
        ("compile: max-autotune", "x.yaml:1", "inductor"),  # modes of torch.compile
        ("expandable_segments: 'on'", "x.yaml:1", "True"),
        ("profile: 0", "x.yaml:1", "False"),
        ("parallel_config: {reshard_after_forward: always}", "x.yaml:1", "True"),  # torchtitan
        ("fp8_config: {recipe: rowise}", "x.yaml:1", "rowwise"),
        ("fp8_config: {recipe: delayed}", "x.yaml:1", "tensorwise"),  # Megatron-LM
        ("fp8: True", "x.yaml:1", "fp8_config.recipe"),  # LLaMA-Factory
        ("fp8_config: {enabled: True}", "x.yaml:1", "fp8_config.recipe"),
        ("optimizer: {dtype: bfloat16}", "x.yaml:1", "optimizer.state_dtype"),
        ("recompute_config: {mode: full}", "x.yaml:1", "recompute_config.recompute"),
        ("fsdp_config: {}", "x.yaml:1", "parallel.enable_parallel_optimizer"),
        ("flex_attention: True", "x.yaml:1", "attention_by_documents"),  # axolotl
        ("use_liger_kernel: True", "x.yaml:1", "loss_chunk_tokens"),  # Trainer
        ("profiler_config: {}", "x.yaml:1", "profile"),
        ("context: {determinstic: 'ON'}", "x.yaml:1", "deterministic"),
        ("context: {device_traget: CPU}", "x.yaml:1", "context.device_target"),
    ],
)
def test_other_values_and_words_get_the_nearest(text: str, where: str, nearest: str) -> None:
    problems = read_tree(read_text(f"{text}\n", "x.yaml")).problems
    problem = next(p for p in problems if p.where == where)
    assert nearest in f"{problem.nearest} {problem.rule}"


def test_null_is_no_word_for_off() -> None:
    (problem,) = read_tree(read_text("attention_by_documents: null\n", "x.yaml")).problems
    assert problem.nearest == ""


def test_words_whose_values_differ_have_a_remark() -> None:
    problems = read_tree(read_text("recompute_granularity: full\n", "x.yaml")).problems
    assert "recompute_operations: True" in problems[0].advice


@pytest.mark.parametrize("is_there", [False, True])
def test_fp8_without_torchao_is_found_before_anything_starts(
    workspace, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    spec = ModuleSpec("torchao", None) if is_there else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    problems = found("deterministic: False\nfp8_config: {recipe: rowwise}\n")
    assert ["torchao" in text for text in problems] == [True] * (not is_there)
