"""One process and many compute the same run."""

from __future__ import annotations

import pytest

from tests.ranks import run_job
from tests.workshop import Workshop

# (ranks, batch of a rank, accumulation, optimizer sharded, ranks of a shard group)
STEPS = 10
LAYOUTS = {
    "2 copies": (2, 4, 1, False, -1),
    "2 shards": (2, 4, 1, True, -1),
    "4 copies": (4, 2, 1, False, -1),
    "4 shards": (4, 2, 1, True, -1),
    "2 copies of 2 shards": (4, 2, 1, True, 2),
    "2 shards, accumulated": (2, 2, 2, True, -1),
    "1 process, accumulated": (1, 2, 4, False, -1),
}


def train(
    workshop: Workshop,
    output: str,
    world: int,
    batch: int,
    accumulation: int,
    sharded: bool,
    shard_size: int,
    **changes: object,
):
    name = workshop.yaml(
        f"{output}.yaml",
        **{
            "output_dir": output,
            "runner_config": {
                "batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "max_steps": STEPS,
            },
            "parallel_config": {"data_parallel": world},
            "parallel": {
                "enable_parallel_optimizer": sharded,
                "parallel_optimizer_config": {"optimizer_weight_shard_size": shard_size},
            },
            "callbacks": [],
            **changes,
        },
    )
    result = run_job(["--config", name, "--run_mode", "train"], workshop.folder, world)
    assert result.code == 0, result.stderr
    return workshop.rows(output)


@pytest.fixture(scope="module")
def one_process(materials: Workshop, tmp_path_factory) -> tuple[Workshop, list[dict]]:
    workshop = materials.copy_to(tmp_path_factory.mktemp("parity"))
    return workshop, train(workshop, "one", 1, 8, 1, False, -1)


@pytest.mark.parametrize("case", LAYOUTS)
def test_loss_curves_agree_with_one_process(one_process, case: str) -> None:
    workshop, expected = one_process
    rows = train(workshop, case.replace(" ", "_").replace(",", ""), *LAYOUTS[case])
    assert len(rows) == len(expected) == STEPS
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.5, "the run must learn something"
    for row, reference in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
        for key in ("step", "epoch", "lr", "tokens", "consumed_samples"):
            assert row[key] == reference[key]


def test_padding_and_dropout_do_not_depend_on_the_layout(one_process) -> None:
    """Rows of unequal length weigh by their tokens; dropout is a function of the sample."""
    workshop, _ = one_process
    changes = {
        "train_dataset": {"packing": False, "seq_length": 48},
        "model": {"model_config": {"attention_dropout": 0.2}},
    }

    def run(output: str, world: int, batch: int, accumulation: int):
        runner = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "epochs": 20}
        return train(
            workshop,
            output,
            world,
            batch,
            accumulation,
            True,
            -1,
            **{**changes, "runner_config": {**runner, "max_steps": 6}},
        )

    alone, together = run("dropout_one", 1, 4, 1), run("dropout_two", 2, 1, 2)
    assert len(alone) == 6
    for row, reference in zip(together, alone, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)


def test_bf16_keeps_fp32_weights_and_agrees_roughly(one_process) -> None:
    from safetensors.torch import load_file

    workshop, expected = one_process
    changes = {
        "model": {"model_config": {"compute_dtype": "bfloat16"}},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 100}],
    }
    for world, batch in ((1, 8), (2, 4)):
        rows = train(workshop, f"bf16_{world}", world, batch, 1, True, -1, **changes)
        assert rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=2e-2)
        assert rows[-1]["loss"] != expected[-1]["loss"]
    folder = workshop.folder / "bf16_2" / "checkpoint" / "rank_1"
    tensors = load_file(next(folder.glob("*.safetensors")))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
