"""More jobs of `run.py` on a virtual GPU: weights in FP8, batches with padding, roll back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.dry_run.driver import job_on_rank
from tests.dry_run.test_jobs import TRAIN
from tests.end_to_end.adapters import write_base
from tests.end_to_end.test_health import POISON
from tests.ranks import run_ranks
from tests.weights.directories import make_in_8_bits
from tests.workshop import Workshop

GPU: dict[str, Any] = {
    "context": {"device_target": "GPU"}, "runner_config": {"max_steps": 2, "batch_size": 4},
}  # fmt: skip
PREDICT = (
    "--config", "run.yaml", "--run_mode", "predict", "--predict_data", "prompts.txt",
    "--load_checkpoint", "output/checkpoint", "--compile", "False", "--predict_batch_size", "3",
    "generation_config.cuda_graphs=False", "generation_config.max_new_tokens=4",
)  # fmt: skip
EXPERTS = {
    "type": "Qwen3MoeConfig", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "tie_word_embeddings": False,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "pp": (2, {"parallel_config": {"pipeline_stage": 2, "micro_batch_num": 2}}),
    "ep": (2, {
        "parallel_config": {"data_parallel": 2, "expert_parallel": 2},
        "parallel": {"enable_parallel_optimizer": True}, "model": {"model_config": EXPERTS},
    }),
}  # fmt: skip


def run(shop: Workshop, ranks: int, *jobs: tuple[str, ...]) -> None:
    for found in run_ranks(ranks, job_on_rank, str(shop.folder), jobs):
        for code, printed, reads in found:
            assert code == 0, printed
            assert set(reads) <= {"expert counts", "group sizes", "stop of one rank"}, printed


@pytest.mark.parametrize("layout", [
    "alone", *(pytest.param(name, marks=pytest.mark.long) for name in ("pp", "ep")),
])  # fmt: skip
def test_prompts_of_unequal_length(workshop: Workshop, layout: str) -> None:
    ranks, changes = LAYOUTS[layout]
    prompts = ["def f(", "return self.", "x", "import textwrap as text", "for line in lines:"]
    (workshop.folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    workshop.yaml(**{**GPU, **changes})
    run(workshop, ranks, TRAIN, PREDICT, (*PREDICT, "generation_config.do_sample=True"))
    answers = (workshop.folder / "output/text_generation_result.txt").read_text()
    assert answers.strip()


@pytest.mark.long
def test_weights_in_8_bits(workshop: Workshop) -> None:
    base = write_base(workshop.folder / "base", workshop.folder / "tokenizer")
    for directory in make_in_8_bits(base, workshop.folder):
        workshop.yaml(f"{directory.name}.yaml", model=None, pretrained_model_dir=directory.name,
                      output_dir=directory.name, **GPU)  # fmt: skip
    jobs = [("--config", f"{name}.yaml", *TRAIN[2:]) for name in ("fp8", "plain")]
    run(workshop, 1, *jobs)
    assert workshop.losses("fp8") == workshop.losses("plain")


@pytest.mark.long
def test_roll_back(workshop: Workshop) -> None:
    (workshop.folder / "mine.py").write_text(POISON)
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 4, "async_save": True}
    workshop.yaml(
        context={"device_target": "GPU"}, callbacks=[monitor, {"type": "Poison"}],
        register_path="mine.py", check_for_nan_in_loss_and_grad=True,
        monitor_config={"roll_back": True}, runner_config={"max_steps": 12},
    )  # fmt: skip
    run(workshop, 1, TRAIN)
    rows = workshop.rows()
    assert [row["step"] for row in rows if "loss" in row][-1] == 12
    assert json.dumps(rows).count("NaN") == 0
