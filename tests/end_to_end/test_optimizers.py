"""Adam, SGD and Muon in runs: resumed bitwise, moved between layouts, saved, merged, sliced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.mindspore.strategy_files import read_strategy
from launcher.tools.slice_safetensors import main as slice_
from launcher.tools.unified_safetensors import main as merge
from tests.ranks import JobResult, run_job
from tests.workshop import BASE, VOCABULARY, Workshop, merged

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"eps": 1e-4, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Muon": {"weight_decay": 0.1, "adamw_eps": 1e-4},
}
TOLERANCES = {"Adam": 1e-5, "SGD": 1e-5, "Muon": 2e-3}
"""Of losses on another layout; Muon rounds to bfloat16 on its way."""
EXPERTS = {"type": "Qwen3MoeConfig", "num_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16, "tie_word_embeddings": False}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "dp2 ep2": (2, {
        "parallel_config": {"data_parallel": 2, "expert_parallel": 2},
        "parallel": {"enable_parallel_optimizer": True}, "runner_config": {"batch_size": 4},
    }),
    "dp2 tp2": (4, {
        "parallel_config": {"data_parallel": 2, "model_parallel": 2, "use_seq_parallel": True},
        "parallel": {"enable_parallel_optimizer": True}, "runner_config": {"batch_size": 4},
    }),
    "pp2": (2, {
        "parallel_config": {"pipeline_stage": 2, "micro_batch_num": 2},
        "runner_config": {"batch_size": 4},
    }),
}  # fmt: skip
"""Ranks and configuration."""
STEPS = ("--max_steps", "8")


def train(
    workshop: Workshop, optimizer: str, layout: str, output: str, *more: str, **changes: Any
) -> JobResult:
    ranks, config = LAYOUTS[layout]
    keys = {"type": optimizer, "eps": None, **OPTIMIZERS[optimizer]}
    name = workshop.yaml(
        f"{output}.yaml", output_dir=output, model={"model_config": EXPERTS}, optimizer=keys,
        **config, **changes,
    )  # fmt: skip
    return run_job(["--config", name, "--run_mode", "train", *more], workshop.folder, ranks)


def ok(result: JobResult) -> None:
    assert result.code == 0, result.stderr + result.stdout


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [
        ("Muon", "dp2 tp2"),
        ("Muon", "dp2 ep2"),
        ("SGD", "alone"),
        *(pytest.param(o, layout, marks=pytest.mark.long)
          for o in OPTIMIZERS for layout in LAYOUTS),
    ],
)  # fmt: skip
def test_the_same_layout_resumes_bitwise(workshop: Workshop, optimizer, layout) -> None:
    ok(train(workshop, optimizer, layout, "full", *STEPS))
    ok(train(workshop, optimizer, layout, "parts", *STEPS, "--runner_config.stop_step", "4"))
    ok(train(workshop, optimizer, layout, "parts", *STEPS, "--resume_training", "True"))
    ranks = LAYOUTS[layout][0]
    full, parts = (workshop.saved(output, "1_8", ranks) for output in ("full", "parts"))
    assert [key for key in full if full[key] != parts[key]] == []
    assert workshop.losses("full") == workshop.losses("parts")


ROUTE = ["dp2 tp2", "alone", "pp2", "dp2 ep2"]


@pytest.mark.parametrize(
    "optimizer", ["Muon", *(pytest.param(o, marks=pytest.mark.long) for o in ("Adam", "SGD"))]
)
def test_a_run_goes_on_from_layout_to_layout(workshop: Workshop, optimizer: str) -> None:
    ok(train(workshop, optimizer, "alone", "full"))
    for index, layout in enumerate(ROUTE, start=1):
        ok(train(workshop, optimizer, layout, "moved", "--resume_training", "True",
                 "--runner_config.stop_step", str(5 * index)))  # fmt: skip
    expected = pytest.approx(workshop.losses("full"), rel=TOLERANCES[optimizer])
    assert workshop.losses("moved") == expected
    assert workshop.losses("full")[-1] < workshop.losses("full")[0] - 0.03


def rank_files(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted(folder.glob("rank_*/*.safetensors"))]


def merged_by_tool(workshop: Workshop, output: str) -> Path:
    target = workshop.folder / f"{output}_merged"
    assert merge(["--mindspore_ckpt_dir", str(workshop.folder / output / "checkpoint"),
                  "--output_dir", str(target), "--file_suffix", "1_2"]) == 0  # fmt: skip
    return target


def test_what_muon_saved_is_merged_and_sliced_back_as_it_was(workshop: Workshop, capsys) -> None:
    for output, once in (("twice", False), ("once", True)):
        monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 2,
                   "remove_redundancy": once}  # fmt: skip
        ok(train(workshop, "Muon", "dp2 tp2", output, "--max_steps", "2", callbacks=[monitor]))
    complete = {output: merged_by_tool(workshop, output) for output in ("twice", "once")}
    files = sorted(file.name for file in complete["once"].glob("*.safetensors"))
    assert [name.partition("-")[0] for name in files] == ["model", "optimizer"]
    for name in files:
        assert_equal(load_file(complete["once"] / name), load_file(complete["twice"] / name))
    sliced = workshop.folder / "sliced"
    assert slice_(["--unified_safetensors_dir", str(complete["once"]), "--dst_safetensors_dir",
                   str(sliced), "--config", str(workshop.folder / "twice.yaml")]) == 0  # fmt: skip
    before = rank_files(workshop.folder / "twice/checkpoint")
    for one, other in zip(before, rank_files(sliced), strict=True):
        assert_equal(one, other)
    strategy = read_strategy(workshop.folder / "twice/strategy").by_stage()[0]
    states = {name for name in before[0] if name.startswith(("muon_m.", "adam_"))}
    experts = {name for name in before[0] if ".experts." in name}
    assert {name for name in strategy if name.startswith(("muon_m.", "adam_"))} == states - experts
    assert "muon_m.model.layers.0.mlp.gate.weight" in states
    assert "adam_v.model.embed_tokens.weight" in states
    assert not any(name.startswith("adam_m.model.layers.0.mlp") for name in states)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("before", "after"), [("SGD", "Muon"), ("Muon", "Adam")])
def test_a_resume_with_another_optimizer_needs_its_state(workshop, before, after) -> None:
    ok(train(workshop, before, "alone", "output", "--max_steps", "2"))
    result = train(workshop, after, "alone", "output", "--resume_training", "True")
    assert result.code == 2
    assert f"was saved with optimizer.type {before}: it has no `" in result.stderr
    assert "output.yaml:" in result.stderr
    assert f"Nearest: optimizer.type: {before}" in result.stderr


def test_sgd_without_momentum_goes_on_from_any_optimizer_and_saves_weights_alone(
    workshop: Workshop,
) -> None:
    ok(train(workshop, "Adam", "alone", "output", "--max_steps", "2"))
    plain = ["--resume_training", "True", "optimizer.momentum=0", "optimizer.dampening=0"]
    result = train(workshop, "SGD", "alone", "output", *plain, "--max_steps", "4")
    ok(result)
    assert "optimizer was Adam, is SGD from here on" in result.stdout
    (weights,) = (workshop.folder / "output/checkpoint/rank_0").glob("*-1_4.safetensors")
    assert all(name.startswith(("model.", "lm_head.")) for name in load_file(weights))
    ok(train(workshop, "SGD", "alone", "output", *plain, "--max_steps", "6"))


@pytest.mark.long
def test_muon_trains_a_module_of_transformers_sharded_as_in_one_process(workshop) -> None:
    base = merged(BASE, {"model": {"model_config": None}, "optimizer": {"eps": None}})
    base["model"]["model_config"] = {"type": "GPT2Config", "vocab_size": VOCABULARY, "n_embd": 32,
                                     "n_layer": 2, "n_head": 4, "n_positions": 64}  # fmt: skip
    sharded = {
        "parallel_config": {"data_parallel": 2}, "runner_config": {"batch_size": 4},
        "parallel": {"enable_parallel_optimizer": True},
    }  # fmt: skip
    for output, ranks, changes in (("one", 1, {}), ("two", 2, sharded)):
        keys = {"type": "Muon", **OPTIMIZERS["Muon"]}
        name = workshop.yaml(f"{output}.yaml", base, output_dir=output, optimizer=keys, **changes)
        ok(run_job(["--config", name, "--run_mode", "train"], workshop.folder, ranks))
    expected = pytest.approx(workshop.losses("one"), rel=TOLERANCES["Muon"])
    assert workshop.losses("two") == expected
    (state,) = (workshop.folder / "one/checkpoint/rank_0").glob("*-1_20.safetensors")
    assert "muon_m.transformer.h.0.attn.c_attn.weight" in load_file(state)
