"""A resumed run is the uninterrupted run: bitwise on the same layout, in value on others."""

from __future__ import annotations

import json

import pytest

from tests.ranks import JobResult, run_job
from tests.workshop import BASE, Workshop

CASES = {
    "packed": (1, {}),
    "padded": (1, {"train_dataset": {"packing": False}, "runner_config": {"epochs": 40}}),
    "dropout": (1, {"model": {"model_config": {"attention_dropout": 0.1, "hidden_dropout": 0.1}}}),
    "across an epoch border": (
        1,
        {"train_dataset": {"data_loader": {"num_samples": 2}}, "runner_config": {"epochs": 9}},
    ),
    "accumulated, two ranks, sharded, bf16": (
        2,
        {
            "runner_config": {"batch_size": 2, "gradient_accumulation_steps": 2},
            "parallel": {"enable_parallel_optimizer": True},
            "model": {"model_config": {"compute_dtype": "bfloat16"}},
        },
    ),
    "two ranks, copies, dropout": (
        2,
        {
            "runner_config": {"batch_size": 4},
            "model": {"model_config": {"attention_dropout": 0.1}},
        },
    ),
    "two ranks, each tensor saved once, read once": (
        2,
        {
            "runner_config": {"batch_size": 4},
            "callbacks": [
                {
                    "type": "CheckpointMonitor",
                    "save_checkpoint_steps": 10,
                    "remove_redundancy": True,
                }
            ],
            "balanced_load": True,
        },
    ),
    "sinks of five": (1, {"runner_config": {"sink_mode": True, "sink_size": 5}}),
    "a transformers module with dropout": (
        1,
        {
            "model": {
                "model_config": {
                    "type": "GPTNeoXConfig",
                    "hidden_dropout": 0.1,
                    "num_key_value_heads": None,
                    "head_dim": None,
                    "tie_word_embeddings": False,
                }
            }
        },
    ),
}


def run(workshop: Workshop, name: str, world: int, *more: str) -> JobResult:
    result = run_job(["--config", name, "--run_mode", "train", *more], workshop.folder, world)
    assert result.code == 0, result.stderr + result.stdout
    return result


@pytest.mark.parametrize("case", CASES)
def test_ten_and_ten_steps_are_bitwise_twenty(workshop: Workshop, case: str) -> None:
    world, changes = CASES[case]
    name = workshop.yaml(**{**changes, "parallel_config": {"data_parallel": world}})
    run(workshop, name, world, "--output_dir", "whole")
    run(workshop, name, world, "--output_dir", "parts", "--runner_config.stop_step", "10")
    result = run(workshop, name, world, "--output_dir", "parts", "--resume_training", "True")
    assert "step 10 of 20" in result.stdout
    last = sorted((workshop.folder / "whole/checkpoint/manifest").glob("*.json"))
    names = {
        path.stem.rpartition("-")[2]: json.loads(path.read_text())["global_step"] for path in last
    }
    newest = next(name for name, step in names.items() if step == 20)
    whole, parts = (workshop.saved(output, newest, world) for output in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [key for key in whole if whole[key] != parts[key]] == []
    assert workshop.losses("whole") == workshop.losses("parts")


def test_other_world_sizes_see_the_same_samples_and_losses(workshop: Workshop) -> None:
    name = workshop.yaml()
    run(workshop, name, 1, "--output_dir", "whole")
    layouts = [(4, "2", "True"), (2, "4", "False"), (1, "8", "False")]
    for stop, (world, batch, sharded) in zip((7, 14, 20), layouts, strict=True):
        run(
            workshop,
            name,
            world,
            "--output_dir",
            "moved",
            "--resume_training",
            "True",
            "--parallel_config.data_parallel",
            str(world),
            "--batch_size",
            batch,
            "--parallel.enable_parallel_optimizer",
            sharded,
            "--runner_config.stop_step",
            str(stop),
        )
    assert workshop.losses("moved") == pytest.approx(workshop.losses("whole"), rel=1e-5)
    consumed = [row["consumed_samples"] for row in workshop.rows("moved")]
    assert consumed == [8 * step for step in range(1, 21)]


def test_a_changed_global_batch_goes_on_by_samples(workshop: Workshop) -> None:
    name = workshop.yaml()
    run(workshop, name, 1, "--runner_config.stop_step", "10")
    result = run(
        workshop, name, 1, "--resume_training", "True", "--batch_size", "4", "--max_steps", "22"
    )
    assert "global batch was 8, is 4: resuming after 80 samples, as step 20" in result.stdout
    consumed = [row["consumed_samples"] for row in workshop.rows()]
    assert consumed == [*range(8, 81, 8), 84, 88], "no row is lost though steps are counted again"
    names = {path.name for path in (workshop.folder / "output/checkpoint/manifest").iterdir()}
    assert names == {"CKP-1_10.json", "CKP_1-1_22.json"}, "and no name comes twice"


def resume_report(result: JobResult) -> list[str]:
    """The lines from `resumed:` to the last that is indented or closes it, one blank for many."""
    lines = result.stdout.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("resumed:"))
    rest = [line for line in lines[begin:] if not line.startswith("warning:")]
    end = next(n for n, line in enumerate(rest) if line.startswith(("training:", "nothing to do")))
    return [" ".join(line.split()) for line in rest[:end]]


def test_the_resume_report_of_a_run_without_its_newest_checkpoint(workshop: Workshop) -> None:
    """E06 of the reference: it is deleted, and its steps come out as they were."""
    name = workshop.yaml(parallel_config={"data_parallel": 2}, runner_config={"batch_size": 4})
    run(workshop, name, 2)
    losses = workshop.losses()
    for file in (workshop.folder / "output/checkpoint").rglob("*1_20*"):
        file.unlink()
    result = run(workshop, name, 2, "--resume_training", "True")
    assert resume_report(result) == [
        "resumed: CKP-1_10 of output/checkpoint, step 10 of 20",
        "saved by 2 ranks (dp_replicate 2) after 80 samples, 2560 tokens",
        "restored weights, optimizer state, schedule, data position, random numbers",
        "nothing changed: the run continues bit for bit",
    ]
    assert workshop.losses() == losses


def test_the_resume_report_names_what_changed_since(workshop: Workshop) -> None:
    name, stop = workshop.yaml(), ("--runner_config.stop_step", "10")
    run(workshop, name, 1, *stop)
    moved = run(workshop, name, 2, *stop, "--resume_training", "True", "--seed", "8",
                "--train_dataset.seed", "7", "--output_dir", "other",
                "--load_checkpoint", "output/checkpoint", "--parallel_config.data_parallel", "2",
                "--batch_size", "4")  # fmt: skip
    assert resume_report(moved)[2:] == [
        "restored weights, optimizer state, schedule, data position",
        "changed since:",
        "layout 1 rank (not cut) -> 2 ranks (dp_replicate 2)",
        "configuration seed: 7 -> 8",
        "runner_config.batch_size: 8 -> 4",
        "parallel_config.data_parallel: 1 -> 2",
        "train_dataset.seed: left out -> 7",
    ]
    assert "warning: seed was 7, is 8 from here on" in moved.stdout


def test_nothing_to_resume_is_a_fresh_start_with_a_warning(workshop: Workshop) -> None:
    result = run(workshop, workshop.yaml(), 1, "--resume_training", "True", "--max_steps", "2")
    assert "has no checkpoint: starting at step 1" in result.stdout + result.stderr
    assert len(workshop.losses()) == 2


def test_changed_data_is_an_error_until_a_position_is_configured(workshop: Workshop) -> None:
    name = workshop.yaml()
    run(workshop, name, 1, "--runner_config.stop_step", "10")
    (workshop.folder / "corpus" / "new.py").write_text("print('more')\n" * 50)
    arguments = ["--config", name, "--run_mode", "resume"]
    refused = run_job(arguments, workshop.folder)
    assert refused.code == 2
    assert "not that of the checkpoint (the content of the files differs)" in refused.stderr
    flags = ["--train_dataset.seq_length", "16", "--train_dataset.packing_strategy", "first_fit"]
    other = run_job([*arguments, *flags], workshop.folder)
    assert "command line: --train_dataset.seq_length: the training data is not" in other.stderr
    assert "train_dataset.seq_length: 32 -> 16" in other.stderr
    assert "train_dataset.packing_strategy: None -> first_fit" in other.stderr
    assert "ignore_data_skip" in refused.stderr
    fresh = run_job(
        [*arguments, "--ignore_data_skip", "True", "--max_steps", "12"], workshop.folder
    )
    assert fresh.code == 0, fresh.stderr
    assert "beginning at sample 0, as configured" in fresh.stdout


def test_a_damaged_newest_checkpoint_is_reported_and_skipped(workshop: Workshop) -> None:
    name = workshop.yaml()
    run(workshop, name, 1)
    newest = workshop.folder / "output/checkpoint/rank_0/CKP_rank_0-1_20.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    result = run(workshop, name, 1, "--resume_training", "True")
    assert "skipped CKP-1_20" in result.stdout
    assert "step 10 of 20" in result.stdout
    assert workshop.losses()[10:] == workshop.losses()[-10:]
    assert len(workshop.losses()) == 20, "the rows of steps 11 to 20 are made again, not doubled"


def test_one_checkpoint_can_be_named(workshop: Workshop) -> None:
    name = workshop.yaml()
    run(workshop, name, 1)
    result = run(
        workshop,
        name,
        1,
        "--resume_training",
        "CKP_rank_0-1_10",
        "--output_dir",
        "other",
        "--load_checkpoint",
        "output/checkpoint",
    )
    assert "resumed: CKP-1_10" in result.stdout
    wrong = run_job(
        ["--config", name, "--resume_training", "CKP_rank_0-1_11", "--run_mode", "train"],
        workshop.folder,
    )
    assert wrong.code == 2
    assert "it holds CKP-1_10, CKP-1_20" in wrong.stderr


def test_a_first_save_cut_short_does_not_stop_always_resume(workshop: Workshop) -> None:
    (workshop.folder / "output/checkpoint/rank_0").mkdir(parents=True)
    (workshop.folder / "output/checkpoint/rank_0/.CKP_rank_0-1_10.safetensors.tmp").touch()
    result = run(workshop, workshop.yaml(), 1, "--resume_training", "True", "--max_steps", "2")
    assert "has no checkpoint: starting at step 1" in result.stdout + result.stderr


def test_dropout_that_a_family_has_by_default_is_exact_too(workshop: Workshop) -> None:
    model = {
        "type": "GPT2Config", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_positions": 128,
    }  # fmt: skip
    base = {**BASE, "model": {"model_config": model}}
    name = workshop.yaml(base=base, train_dataset={"packing": False}, runner_config={"epochs": 20})
    run(workshop, name, 1, "--output_dir", "whole")
    run(workshop, name, 1, "--output_dir", "parts", "--runner_config.stop_step", "7")
    run(workshop, name, 1, "--output_dir", "parts", "--resume_training", "True")
    assert workshop.losses("whole") == workshop.losses("parts")
    run(workshop, name, 1, "--output_dir", "other", "--max_steps", "3", "--train_dataset.seed", "7",
        "--seed", "8")  # fmt: skip
    assert workshop.losses("other")[0] != workshop.losses("whole")[0]
