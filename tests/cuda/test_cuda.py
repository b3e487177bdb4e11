"""The same promises on a GPU: skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from launcher.generation.draw import draw, draw_seed
from tests.end_to_end.test_processes import start
from tests.workshop import Workshop

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_draws_are_those_of_the_cpu() -> None:
    scores = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    seeds = [draw_seed(1, index, 2) for index in range(len(scores))]
    assert torch.equal(draw(scores.cuda(), seeds).cpu(), draw(scores, seeds))


ON_CUDA = {"context": {"device_target": "GPU"}}


def train(workshop: Workshop, output: str, *more: str, **changes: object) -> list[float]:
    name = workshop.yaml(f"{output}.yaml", **{**ON_CUDA, **changes})
    process = start(
        workshop, "--config", name, "--run_mode", "train", "--output_dir", output, *more
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err + out
    return workshop.losses(output)


@pytest.mark.parametrize("packing", [True, False])
def test_fp32_agrees_with_the_cpu(workshop: Workshop, packing: bool) -> None:
    changes = {
        "train_dataset": {"packing": packing},
        "runner_config": {"epochs": 40},
        "model": {"model_config": {"compute_dtype": "float32"}},
    }
    on_gpu = train(workshop, "gpu", **changes)
    on_cpu = train(workshop, "cpu", **{**changes, "context": {"device_target": "CPU"}})
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    workshop: Workshop, dtype: str, dropout: float, packing: bool
) -> None:
    changes = {
        "model": {"model_config": {"compute_dtype": dtype, "attention_dropout": dropout}},
        "train_dataset": {"packing": packing},
        "runner_config": {"epochs": 40},
    }
    train(workshop, "whole", **changes)
    train(workshop, "parts", "--runner_config.stop_step", "10", **changes)
    train(workshop, "parts", "--resume_training", "True", **changes)
    assert workshop.losses("whole") == workshop.losses("parts")
