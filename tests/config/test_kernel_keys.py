"""The keys about kernels and memory of GPUs: values, and words of other tools."""

from __future__ import annotations

import pytest

from launcher.config.resolve import read_tree
from launcher.config.yaml_reader import read_text


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
    ],
)
def test_other_values_and_words_get_the_nearest(text: str, where: str, nearest: str) -> None:
    problems = read_tree(read_text(f"{text}\n", "x.yaml")).problems
    problem = next(p for p in problems if p.where == where)
    assert nearest in f"{problem.nearest} {problem.rule}"
