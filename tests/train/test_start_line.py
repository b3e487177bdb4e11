"""The line at the start of a run, and the kernels that are set with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.builders import start
from launcher.builders.job import Job
from launcher.builders.start import chosen_kernels, start_line
from launcher.config.nodes import from_plain
from launcher.config.resolve import read_tree
from launcher.errors import UserError
from launcher.parallel.kernels import Kernels, current_kernels
from launcher.parallel.world import World
from launcher.report.console import Console

QWEN = {
    "type": "Qwen3Config", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
IN_FLOAT32 = {**QWEN, "compute_dtype": "float32"}
FOREIGN = {
    "type": "GPT2Config", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Torch as it was."""
    before = current_kernels()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    before.apply()
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def job(
    device: str, mode: str = "train", model: dict[str, Any] | None = None, **keys: Any
) -> tuple[Job, list[str]]:
    """A job on `device`, which need not exist, and the lines it logs."""
    lines: list[str] = []
    content = {"run_mode": mode, "model": {"model_config": model or QWEN}, **keys}
    resolved = read_tree(from_plain(content, "a.yaml:1"))
    assert not resolved.problems
    world = World(0, 1, torch.device(device))
    made = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
    object.__setattr__(made, "log", lines.append)
    return made, lines


@pytest.mark.parametrize(
    ("mode", "model", "keys", "parts", "absent"),
    [
        ("train", QWEN, {}, ["deterministic (costs", "flash, memory-efficient, math"], "cuDNN;"),
        ("train", FOREIGN, {"deterministic": True}, ["deterministic (costs"], "transformers"),
        ("train", FOREIGN, {}, ["where transformers allows it", "torch warns"], "costs"),
        ("train", QWEN, {"deterministic": False}, ["not deterministic", "math, cuDNN"], "costs"),
        ("predict", QWEN, {"deterministic": False}, ["not deterministic", ", math"], "cuDNN"),
        ("eval", QWEN, {}, ["deterministic (costs", ", math"], ", cuDNN"),
        ("train", IN_FLOAT32, {}, ["documents apart by blocks of scores"], "variable lengths"),
    ],
)
def test_the_line_names_the_rule_and_its_price(
    mode: str, model: dict[str, Any], keys: dict[str, Any], parts: list[str], absent: str
) -> None:
    line = start_line(job("cuda", mode, model, **keys)[0])
    assert line.startswith("kernels: ")
    assert all(part in line for part in parts), line
    assert absent not in line


def test_the_page_quotes_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/cuda.md").read_text()
    monkeypatch.setattr(start, "PARTS", start.PARTS[:3])  # without what depends on the machine
    assert start_line(job("cuda")[0]) in page
    assert start_line(job("cuda", deterministic=False)[0]) in page


def test_tf32_and_the_allocator_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    line = start_line(job("cuda", deterministic=False)[0])
    torch.set_float32_matmul_precision(before)
    assert "float32 products in TF32" in line
    assert "allocator max_split_size_mb:64" in line


def test_others_add_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "PARTS", (lambda _: "", lambda _: "one", lambda _: "two"))
    assert start_line(job("cpu")[0]) == "kernels: one; two"


def test_on_the_cpu_nothing_is_set_or_said() -> None:
    before = current_kernels()
    made, lines = job("cpu", deterministic=True)
    with chosen_kernels(made):
        assert current_kernels() == before
    assert lines == []


def test_on_a_gpu_the_kernels_are_set_before_the_run() -> None:
    made, lines = job("cuda")
    with chosen_kernels(made):
        assert current_kernels() == Kernels("strict") == made.kernels
    assert lines == [start_line(made)]


def test_a_refused_operation_is_reported_at_its_key() -> None:
    made, _ = job("cuda", deterministic=True)
    with pytest.raises(UserError) as error, chosen_kernels(made):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    [problem] = error.value.problems
    assert problem.what.startswith("deterministic = True: ")
    assert problem.where == "a.yaml:1"


@pytest.mark.parametrize(
    ("dtype", "part"), [("bfloat16", "experts by one kernel"), ("float16", "experts one by one")]
)
def test_how_experts_are_computed_is_reported(dtype: str, part: str) -> None:
    model = QWEN | {"type": "Qwen3MoeConfig", "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16, "compute_dtype": dtype}  # fmt: skip
    assert part in start_line(job("cuda", model=model)[0])
    assert "experts" not in start_line(job("cuda", model=QWEN)[0])
