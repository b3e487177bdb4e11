"""Training on preferences: the same losses on every layout, resumed, with adapters, in mixtures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.preferences import settings, write_preferences
from tests.ranks import JobResult, run_job
from tests.workshop import Workshop, merged

LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "accumulated": {"runner_config": {"batch_size": 1, "gradient_accumulation_steps": 4}},
    "dp2 tp2": {
        "parallel_config": {"data_parallel": 2, "model_parallel": 2, "use_seq_parallel": True},
        "parallel": {"enable_parallel_optimizer": True},
        "runner_config": {"batch_size": 1, "gradient_accumulation_steps": 2},
    },
    "pp2": {
        "parallel_config": {"pipeline_stage": 2, "micro_batch_num": 2},
        "runner_config": {"batch_size": 2},
    },
    "zbv tp2": {
        "parallel_config": {"pipeline_stage": 2, "micro_batch_num": 4, "model_parallel": 2},
        "runner_config": {"batch_size": 1},
        "parallel": {"pipeline_config": {"pipeline_scheduler": "zero_bubble_v"}},
        "model": {"model_config": {"num_hidden_layers": 4}},
    },
    "cp2": {"parallel_config": {"context_parallel": 2}},
    "cp2 pp2": {
        "parallel_config": {"context_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 4},
        "runner_config": {"batch_size": 1},
    },
    "ep2": {
        "parallel_config": {"data_parallel": 2, "expert_parallel": 2},
        "runner_config": {"batch_size": 2},
        "parallel": {"enable_parallel_optimizer": True},
    },
}  # fmt: skip
MOE = {
    "type": "Qwen3MoeConfig", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "tie_word_embeddings": False,
}  # fmt: skip
LORA = {"pet_config": {"pet_type": "lora", "lora_rank": 4, "target_modules": "all-linear"}}


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    write_preferences(workshop)
    return workshop


def ranks(layout: str) -> int:
    degrees = LAYOUTS[layout].get("parallel_config", {})
    count = 1
    for axis in ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel"):
        count *= degrees.get(axis, 1)
    return count


def train(
    shop: Workshop, layout: str, output: str, base: dict[str, Any], *more: str, mode: str = "train"
) -> JobResult:
    changes = merged(merged(base, LAYOUTS[layout]), {"output_dir": output})
    name = shop.yaml(f"{output}.yaml", **changes)
    arguments = ["--config", name, "--run_mode", mode, *more]
    result = run_job(arguments, shop.folder, ranks(layout))
    assert result.code == 0, result.stderr + result.stdout
    return result


def measured(shop: Workshop, output: str) -> list[dict[str, float]]:
    """Losses, norms and metrics of every row."""
    kept = ("loss", "grad_norm", "rewards", "logps", "eval_", "kl", "nll", "log_odds")
    return [
        {key: value for key, value in row.items() if key.startswith(kept)}
        for row in shop.rows(output)
    ]


def assert_equal(shop: Workshop, output: str, other: str) -> None:
    for row, expected in zip(measured(shop, output), measured(shop, other), strict=True):
        if abs(expected.get("rewards/margins", 1)) < 1e-5:  # equal but for rounding: either wins
            row.pop("rewards/accuracies", None), expected.pop("rewards/accuracies", None)
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for key in ("loss", "eval_loss"):
            if key in row:
                assert row[key] == pytest.approx(expected[key], rel=1e-5)


def test_dpo_on_one_rank_and_on_four(shop: Workshop) -> None:
    base = settings("dpo", beta=0.3)
    alone = train(shop, "alone", "alone", base)
    assert "reference: log-probabilities of 16 samples of train_dataset" in alone.stdout
    again = train(shop, "dp2 tp2", "four", base)
    assert "samples of train_dataset (from the cache" in again.stdout
    for file in (shop.folder / "cache").glob("reference-*"):
        content = file.read_bytes()
        file.write_bytes(bytes(8) + content[8:])  # as a disk that lost a block leaves it
    train(shop, "alone", "damaged", base)
    assert shop.losses("damaged") == shop.losses("alone")
    assert_equal(shop, "four", "alone")
    first, *_, last = shop.rows("alone")
    assert first["rewards/margins"] == 0
    assert last["eval_rewards/accuracies"] > 0.5
    assert last["eval_samples"] == 24


@pytest.mark.long
@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "kto"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("alone", "ep2")])
def test_the_losses_do_not_depend_on_the_layout(shop: Workshop, layout: str, loss: str) -> None:
    base = settings(loss, sft_weight=0.5) if loss == "ipo" else settings(loss)
    if "model" in LAYOUTS[layout]:
        base = merged(base, {"model": LAYOUTS[layout]["model"]})
    train(shop, "alone", "alone", merged(base, {"data_cache": {"dir": "cache1"}}))
    train(shop, layout, "laid_out", merged(base, {"data_cache": {"dir": "cache2"}}))
    assert_equal(shop, "laid_out", "alone")


@pytest.mark.long
@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("layout", ["accumulated", "dp2 tp2", "pp2", "ep2"])
def test_below_an_adapter_the_base_is_the_reference(shop: Workshop, layout: str, loss: str) -> None:
    base = merged(settings(loss), LORA)
    if layout == "ep2":
        base = merged(base, {"model": {"model_config": MOE}})
    alone = train(shop, "alone", "alone", base)
    assert "reference: log-probabilities" not in alone.stdout
    assert "reference: the base model below the adapter" in alone.stdout
    train(shop, layout, "laid_out", base)
    assert_equal(shop, "laid_out", "alone")
    assert shop.rows("alone")[0]["rewards/chosen"] == 0


@pytest.mark.long
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_with_experts(shop: Workshop, loss: str) -> None:
    base = merged(settings(loss), {"model": {"model_config": MOE}})
    train(shop, "alone", "alone", merged(base, {"data_cache": {"dir": "cache1"}}))
    train(shop, "ep2", "laid_out", merged(base, {"data_cache": {"dir": "cache2"}}))
    assert_equal(shop, "laid_out", "alone")


def test_a_run_resumes_bitwise_with_the_first_reference(shop: Workshop) -> None:
    base = merged(settings("dpo"), {"do_eval": False})
    train(shop, "alone", "whole", base)
    train(shop, "alone", "parts", base, "--runner_config.stop_step", "2")
    stops = (["--runner_config.stop_step", "3"], [])
    for stop in stops:
        resumed = train(shop, "alone", "parts", base, "--resume_training", "True", *stop)
        assert ("reference: the first weights" in resumed.stdout) is (stop == [])
        for file in (shop.folder / "cache").glob("reference-*"):
            file.unlink()  # to be computed again, from the first weights
    assert shop.losses("whole") == shop.losses("parts")
    whole, parts = (shop.saved(output, "1_4") for output in ("whole", "parts"))
    assert [key for key in whole if whole[key] != parts[key]] == []


@pytest.mark.long
def test_a_run_with_an_adapter_resumes_bitwise(shop: Workshop) -> None:
    base = merged(merged(settings("kto"), LORA), {"do_eval": False})
    train(shop, "alone", "whole", base)
    train(shop, "alone", "parts", base, "--runner_config.stop_step", "2")
    train(shop, "alone", "parts", base, "--resume_training", "True")
    assert shop.losses("whole") == shop.losses("parts")


@pytest.mark.long
def test_a_reference_that_is_gone_is_not_another_one(shop: Workshop) -> None:
    base = merged(settings("dpo"), {"do_eval": False})
    train(shop, "alone", "output", base, "--runner_config.stop_step", "2")
    (file,) = (shop.folder / "cache").glob("reference-*")
    file.unlink()
    name = shop.yaml("other.yaml", **merged(base, {"seed": 8}))
    result = run_job(["--config", name, "--run_mode", "train", "--resume_training", "True",
                      "--ignore_data_skip", "True"], shop.folder)  # fmt: skip
    assert result.code == 2
    assert "preference.reference.weights" in result.stderr


@pytest.mark.long
def test_adapters_beside_modules_that_are_trained_in_full(shop: Workshop) -> None:
    """The base leaves with the first step, so that its log-probabilities are computed before it."""
    base = merged(merged(settings("dpo"), LORA), {
        "pet_config": {"modules_to_save": ["lm_head"]},
        "model": {"model_config": {"tie_word_embeddings": False}},
    })  # fmt: skip
    alone = train(shop, "alone", "alone", base)
    assert "reference: log-probabilities" in alone.stdout
    train(shop, "pp2", "laid_out", merged(base, {"data_cache": {"dir": "cache2"}}))
    assert_equal(shop, "laid_out", "alone")
    assert shop.rows("alone")[0]["rewards/chosen"] == 0


@pytest.mark.long
def test_modules_of_a_loaded_adapter_are_not_in_the_reference(shop: Workshop) -> None:
    """It is the base, as where that is named."""
    base = merged(settings("dpo"), {
        "do_eval": False, "model": {"model_config": {"tie_word_embeddings": False}},
    })  # fmt: skip
    train(shop, "alone", "first", merged(base, {"runner_config": {"stop_step": 1}}))
    base["load_checkpoint"] = "first/checkpoint"
    pet = merged(LORA, {"pet_config": {"modules_to_save": ["lm_head"]}})
    train(shop, "alone", "tuned", merged(base, pet), mode="finetune")
    base["pet_config"] = {"load_adapter": "tuned/adapter"}
    named = {"preference": {"reference": {"weights": "first/checkpoint"}}}
    for output, more in (("on", {}), ("named", named)):
        train(shop, "alone", output, merged(base, more), mode="finetune")
    assert shop.losses("on") == pytest.approx(shop.losses("named"), rel=1e-5)
    assert shop.rows("on")[0]["rewards/chosen"] != 0


@pytest.mark.long
def test_named_weights_are_the_reference_below_an_adapter_too(shop: Workshop) -> None:
    base = merged(settings("dpo"), {"do_eval": False})
    train(shop, "alone", "other", merged(base, {"seed": 8, "runner_config": {"stop_step": 1}}))
    named = {"preference": {"reference": {"weights": "other/checkpoint"}}}
    found = {}
    for output, more in (("full", {}), ("adapter", LORA)):
        train(shop, "alone", output, merged(merged(base, named), more))
        found[output] = shop.rows(output)[0]["rewards/chosen"]
    assert found["full"] == pytest.approx(found["adapter"], rel=1e-5)
    assert found["full"] != 0


@pytest.mark.long
def test_the_best_save_is_that_with_the_widest_margin(shop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_best": True,
               "best_metric": "eval_rewards/margins", "best_mode": "max"}  # fmt: skip
    base = settings("dpo") | {"callbacks": [monitor], "eval_step_interval": 2}
    train(shop, "alone", "output", base)
    margins = [row["eval_rewards/margins"] for row in shop.rows() if "eval_loss" in row]
    assert len(margins) == 2
    assert margins[1] > margins[0]


@pytest.mark.long
def test_a_resume_on_another_layout_has_the_same_samples(shop: Workshop) -> None:
    base = settings("kto")
    train(shop, "alone", "whole", base)
    train(shop, "dp2 tp2", "moved", base, "--runner_config.stop_step", "2")
    train(shop, "pp2", "moved", base, "--resume_training", "True")
    assert shop.losses("moved") == pytest.approx(shop.losses("whole"), rel=1e-5)


@pytest.mark.long
def test_an_evaluation_compares_with_named_weights(shop: Workshop) -> None:
    base = settings("dpo")
    train(shop, "alone", "first", merged(base, {"runner_config": {"stop_step": 2}}))
    train(shop, "alone", "output", base)
    found = {}
    for layout in ("alone", "pp2"):
        output = f"eval_{layout}"
        train(shop, layout, output, base, "--load_checkpoint", "output/checkpoint",
              "--preference.reference.weights", "first/checkpoint", mode="eval")  # fmt: skip
        found[layout] = json.loads((shop.folder / output / "eval_result.json").read_text())
    assert found["alone"] == pytest.approx(found["pp2"], rel=1e-5, abs=1e-6)
    assert found["alone"]["eval_rewards/margins"] != 0


@pytest.mark.long
def test_sources_of_a_mixture_have_losses_of_their_own(shop: Workshop) -> None:
    base = merged(settings("dpo"), {"do_eval": False})
    loader = {"type": "PreferenceDataLoader", "dataset_files": "pairs.jsonl"}
    sources = [{**loader, "name": "a", "weight": 3}, {**loader, "name": "b", "weight": 1}]
    base["train_dataset"] = {**base["train_dataset"], "data_loader": sources}
    train(shop, "alone", "alone", base)
    train(shop, "pp2", "laid_out", base)
    rows = shop.rows("alone")
    assert all("loss/a" in row for row in rows)
    assert [row["samples/a"] for row in rows] == [3, 3, 3, 3]
    for row in rows:
        parts = (3 * row["loss/a"] + row["loss/b"]) / 4
        assert parts == pytest.approx(row["loss"], rel=1e-5)
    assert_equal(shop, "laid_out", "alone")
