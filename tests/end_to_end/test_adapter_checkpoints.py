"""Checkpoints of runs with an adapter: what they hold, and what a resume makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from launcher.weights.adapters.found import ADAPTER
from launcher.weights.optimizer_state import parameter_of
from tests.end_to_end.adapters import LORA, MODEL, SAVED, STEPS, lora_yaml, run_jobs, write_base
from tests.workshop import Workshop

DORA = {**LORA, "pet_type": "dora", "lora_dropout": 0.1, "modules_to_save": ["embed_tokens"]}
TOLERANCE = 1e-5
TP, PP = {"model_parallel": 2}, {"pipeline_stage": 2, "micro_batch_num": 2}
STOP = ["--runner_config.stop_step", str(SAVED)]
RESUME = ["--resume_training", "True"]


def train(name: str, *more: str) -> list[str]:
    mode = "train" if name == "half.yaml" else "finetune"
    return ["--config", name, "--run_mode", mode, *more]


@pytest.fixture(scope="module")
def shop(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """One run that never stops, on one process and on two, and others that are resumed."""
    shop = materials.copy_to(tmp_path_factory.mktemp("adapters"))
    write_base(shop.folder / "base", shop.folder / "tokenizer")
    batch = {"runner_config": {"batch_size": 4}}
    one = lora_yaml(shop, "one.yaml", DORA, output_dir="whole")
    tp = lora_yaml(shop, "tp.yaml", DORA, output_dir="tp", parallel_config=TP)
    pp = lora_yaml(shop, "pp.yaml", DORA, output_dir="pp", parallel_config=PP, **batch)
    dp = lora_yaml(
        shop, "dp.yaml", DORA, output_dir="dp", parallel_config={"data_parallel": 2}, **batch,
        parallel={"enable_parallel_optimizer": True},
    )  # fmt: skip
    half = {"params_dtype": "bfloat16", "compute_dtype": "bfloat16"}  # on a random base
    lora_yaml(
        shop, "half.yaml", {**LORA, "lora_dropout": 0.1}, pretrained_model_dir=None,
        model={"model_config": {**MODEL, **half}},
    )  # fmt: skip
    lora_yaml(shop, "frozen.yaml", {"pet_type": None}, freeze=["embed_tokens", "layers.0"])
    lora_yaml(
        shop, "frozen_tp.yaml", {"pet_type": None}, freeze=["embed_tokens", "layers.0"],
        output_dir="frozen_tp", parallel_config=TP,
    )  # fmt: skip
    shop.on_two = run_jobs(shop, 2, [  # type: ignore[attr-defined]
        train(tp, *STOP), train(dp, *STOP), train(tp, *RESUME),
        train(pp, *RESUME, "--load_checkpoint", "tp/checkpoint/rank_0/"
              f"CKP_rank_0-1_{SAVED}.safetensors"),
    ])  # fmt: skip
    shop.on_one = run_jobs(shop, 1, [  # type: ignore[attr-defined]
        train(one), train(one, "--output_dir", "parts", *STOP),
        train(one, "--output_dir", "parts", *RESUME),
        train(one, "--output_dir", "alone", *RESUME, "--load_checkpoint", "dp/checkpoint"),
        *(job for kind in ("half", "frozen") for job in (
            train(f"{kind}.yaml", "--output_dir", f"{kind}_whole"),
            train(f"{kind}.yaml", "--output_dir", f"{kind}_parts", *STOP),
            train(f"{kind}.yaml", "--output_dir", f"{kind}_parts", *RESUME),
        )),
    ])  # fmt: skip
    run_jobs(
        shop,
        2,
        [
            train(
                "frozen_tp.yaml",
                *RESUME,
                "--load_checkpoint",
                f"frozen_parts/checkpoint/rank_0/CKP_rank_0-1_{SAVED}.safetensors",
            )
        ],
    )
    return shop


@pytest.mark.parametrize("kind", ["", "half_", "frozen_"])
def test_a_resumed_run_is_the_uninterrupted_run(shop: Workshop, kind: str) -> None:
    parts, whole = f"{kind}parts", f"{kind}whole"
    assert shop.saved(parts, f"1_{STEPS}") == shop.saved(whole, f"1_{STEPS}")
    assert shop.losses(parts) == shop.losses(whole)


def test_a_random_base_is_named_by_its_seed(shop: Workshop) -> None:
    state = shop.folder / f"half_parts/checkpoint/state/CKP-1_{STEPS}.json"
    assert json.loads(state.read_text())[ADAPTER]["base"] == {"seed": 7}


def test_frozen_parameters_are_saved_without_optimizer_state(shop: Workshop) -> None:
    file = shop.folder / f"frozen_whole/checkpoint/rank_0/CKP_rank_0-1_{STEPS}.safetensors"
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    assert "model.embed_tokens.weight" in names
    assert "adam_m.model.layers.1.mlp.up_proj.weight" in names
    assert not {name for name in names if name.startswith("adam_") and (
        "embed_tokens" in name or "layers.0" in name)}  # fmt: skip
    losses = shop.losses("frozen_tp")
    assert losses == pytest.approx(shop.losses("frozen_whole")[SAVED:], rel=TOLERANCE)


@pytest.mark.parametrize("output", ["tp", "pp", "alone"])
def test_another_layout_goes_on_with_the_same_losses(shop: Workshop, output: str) -> None:
    whole = shop.losses("whole")
    assert whole[-1] < whole[0] - 0.1, "the run must learn something"
    losses = shop.losses(output)
    assert losses == pytest.approx(whole[-len(losses) :], rel=TOLERANCE)
    assert len(losses) == (STEPS if output == "tp" else STEPS - SAVED)


def test_a_checkpoint_holds_the_adapter_alone(shop: Workshop) -> None:
    names = set()
    for file in (shop.folder / "tp/checkpoint").glob(f"rank_*/*-1_{STEPS}.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= {parameter_of(name) for name in opened.keys()}  # noqa: SIM118
    others = {name for name in names if "lora_" not in name}
    assert others == {"model.embed_tokens.weight"}
    assert "model.layers.1.mlp.up_proj.lora_magnitude_vector" in names


def test_the_state_names_base_and_adapter(shop: Workshop) -> None:
    entry = json.loads((shop.folder / f"tp/checkpoint/state/CKP-1_{STEPS}.json").read_text())[
        ADAPTER
    ]
    assert entry["base"]["path"] == str((shop.folder / "base").resolve())
    assert entry["base"]["content"].startswith("24 tensors, ")
    assert entry["config"]["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    assert entry["config"]["modules_to_save"] == ["embed_tokens"]
    assert entry["config"]["use_dora"]


def test_what_does_not_fit_a_resume(shop: Workshop, tmp_path: Path) -> None:
    copy = shop.copy_to(tmp_path / "work")
    other = str(write_base(copy.folder / "other", copy.folder / "tokenizer", seed=1))
    label = f"CKP-1_{STEPS}"
    state = copy.folder / f"parts/checkpoint/state/{label}.json"
    recorded = json.loads(state.read_text())[ADAPTER]["base"]["content"]
    original = shop.folder / "base"
    original.rename(shop.folder / "moved")
    again = [*RESUME, "--output_dir", "parts"]
    moved = ["--pretrained_model_dir", "base"]  # the copy
    try:
        answers = run_jobs(copy, 1, [
            train("one.yaml", *again, "--pretrained_model_dir", other),
            train("one.yaml", *again, *moved, "--pet_config.lora_alpha", "4"),
            train("one.yaml", *again, *moved, "--pet_config.pet_type", "null"),
        ])  # fmt: skip
    finally:
        (shop.folder / "moved").rename(original)
    expected = [(other, recorded), ("lora_alpha", "8"), ("pet_config", label)]
    for answer, words in zip(answers, expected, strict=True):
        for word in words:
            assert word in answer
