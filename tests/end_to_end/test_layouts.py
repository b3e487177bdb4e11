"""A run on any layout: saved, resumed on another, merged, opened by transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.tools.unified_safetensors import main as merge
from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 tp2 pp2": {
        "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2,
                            "micro_batch_num": 2, "use_seq_parallel": True},
        "parallel": {"enable_parallel_optimizer": True},
        "runner_config": {"batch_size": 2},
    },
    "alone": {},
    "pp2 tp2": {
        "parallel_config": {"model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 4,
                            "vocab_emb_dp": False},
        "runner_config": {"batch_size": 2},
        "parallel": {"pipeline_config": {"pipeline_scheduler": "zero_bubble_v"}},
    },
    "dp4": {"parallel_config": {"data_parallel": 4}, "runner_config": {"batch_size": 2},
            "parallel": {"enable_parallel_optimizer": True}},
    "dp2 ep2": {"parallel_config": {"data_parallel": 2, "expert_parallel": 2},
                "runner_config": {"batch_size": 4},
                "parallel": {"enable_parallel_optimizer": True}},
    "ep2 tp2 pp2": {
        "parallel_config": {"data_parallel": 2, "expert_parallel": 2, "model_parallel": 2,
                            "pipeline_stage": 2, "micro_batch_num": 2},
        "runner_config": {"batch_size": 2},
    },
    "cp2 tp2": {"parallel_config": {"context_parallel": 2, "model_parallel": 2}},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3 tied": {"num_hidden_layers": 4},
    "qwen3 moe": {
        "type": "Qwen3MoeConfig", "num_hidden_layers": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False,
    },
}  # fmt: skip


STEPS = 8


def ranks(layout: str) -> int:
    degrees = LAYOUTS[layout].get("parallel_config", {})
    count = 1
    for axis in ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel"):
        count *= degrees.get(axis, 1)
    return count


def train(workshop: Workshop, model: str, layout: str, output: str, *more: str) -> JobResult:
    name = workshop.yaml(
        f"{output}.yaml",
        **{**LAYOUTS[layout], "output_dir": output, "model": {"model_config": MODELS[model]}},
    )
    arguments = ["--config", name, "--run_mode", "train", "--max_steps", str(STEPS), *more]
    result = run_job(arguments, workshop.folder, ranks(layout))
    assert result.code == 0, result.stderr + result.stdout
    return result


def test_the_same_layout_resumes_bitwise(workshop: Workshop) -> None:
    layout, model = "dp2 tp2 pp2", "qwen3 tied"
    train(workshop, model, layout, "whole")
    train(workshop, model, layout, "parts", "--runner_config.stop_step", str(STEPS // 2))
    train(workshop, model, layout, "parts", "--resume_training", "True")
    whole, parts = (workshop.saved(output, f"1_{STEPS}", 8) for output in ("whole", "parts"))
    assert [key for key in whole if whole[key] != parts[key]] == []
    assert workshop.losses("whole") == workshop.losses("parts")


@pytest.mark.parametrize(
    ("model", "route"),
    [
        ("qwen3 tied", ["dp2 tp2 pp2", "alone", "pp2 tp2", "cp2 tp2"]),
        ("qwen3 moe", ["dp2 ep2", "pp2 tp2", "alone"]),
    ],
)
def test_a_run_goes_on_from_layout_to_layout(workshop: Workshop, model: str, route) -> None:
    train(workshop, model, "alone", "whole")
    for index, layout in enumerate(route):
        stop = str(STEPS * (index + 1) // len(route))
        train(workshop, model, layout, "moved", "--resume_training", "True",
              "--runner_config.stop_step", stop)  # fmt: skip
    assert workshop.losses("moved") == pytest.approx(workshop.losses("whole"), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "layout"), [("qwen3 tied", "dp2 tp2 pp2"), ("qwen3 moe", "dp2 ep2")]
)
def test_what_a_layout_saved_merges_into_a_directory_transformers_opens(
    workshop: Workshop, model: str, layout: str
) -> None:
    from transformers import AutoModelForCausalLM

    train(workshop, model, layout, "output", "--max_steps", "4")
    merged = workshop.folder / "merged"
    code = merge(["--mindspore_ckpt_dir", str(workshop.folder / "output/checkpoint"),
                  "--output_dir", str(merged), "--file_suffix", "1_4",
                  "--filter_out_param_prefix", "adam_"])  # fmt: skip
    assert code == 0
    _, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    text = {"type": "TextDataLoader", "dataset_dir": "corpus", "num_samples": 1}
    losses = {}
    for where, ways in (("alone", "alone"), ("cut", layout)):
        name = workshop.yaml(
            f"{where}.yaml",
            **{
                **LAYOUTS[ways], "output_dir": where, "pretrained_model_dir": "merged",
                    "model": None,
                "eval_dataset": {"data_loader": text, "seq_length": 32, "packing": True},
            },
        )  # fmt: skip
        config = workshop.folder / name
        config.write_text(config.read_text().replace("type: Qwen3Config", "vocab_size: 512"))
        result = run_job(["--config", name, "--run_mode", "eval"], workshop.folder, ranks(ways))
        assert result.code == 0, result.stderr + result.stdout
        losses[where] = json.loads((workshop.folder / where / "eval_result.json").read_text())
    assert losses["cut"]["eval_loss"] == pytest.approx(losses["alone"]["eval_loss"], rel=1e-5)
    assert losses["cut"]["eval_tokens"] == losses["alone"]["eval_tokens"]


PREDICTIONS = [
    ("qwen3 tied", "pp2 tp2", ["pp2 tp2", "cp2 tp2"]),
    ("qwen3 moe", "dp2 ep2", ["dp2 ep2"]),
    pytest.param("qwen3 tied", "alone", ["dp2 tp2 pp2", "dp4"], marks=pytest.mark.long),
    pytest.param("qwen3 moe", "alone", ["ep2 tp2 pp2", "pp2 tp2"], marks=pytest.mark.long),
]


@pytest.mark.parametrize(("model", "trained", "layouts"), PREDICTIONS)
def test_predictions_from_files_of_any_layout_are_the_same_on_every_layout(
    workshop: Workshop, model: str, trained: str, layouts: list[str]
) -> None:
    train(workshop, model, trained, "output", "--max_steps", "4")
    code = merge(["--mindspore_ckpt_dir", str(workshop.folder / "output/checkpoint"),
                  "--output_dir", str(workshop.folder / "merged"), "--file_suffix", "1_4",
                  "--filter_out_param_prefix", "adam_"])  # fmt: skip
    assert code == 0
    texts = {}
    sources = [(layout, "output/checkpoint") for layout in ("alone", *layouts)]
    for layout, weights in (*sources, (layouts[0], "merged")):
        name = workshop.yaml(
            "predict.yaml",
            **{**LAYOUTS[layout], "output_dir": layout, "model": {"model_config": MODELS[model]}},
        )
        result = run_job(
            ["--config", name, "--run_mode", "predict", "--load_checkpoint", weights,
             "--predict_data", "def f", "import", "a b c", "--predict_batch_size", "2",
             "generation_config.max_new_tokens=12", "generation_config.do_sample=True"],
            workshop.folder, ranks(layout),
        )  # fmt: skip
        assert result.code == 0, result.stderr + result.stdout
        text = (workshop.folder / layout / "text_generation_result.jsonl").read_text()
        assert len(text.splitlines()) == 3
        texts[layout, weights] = text
    assert set(texts.values()) == {texts["alone", "output/checkpoint"]}
