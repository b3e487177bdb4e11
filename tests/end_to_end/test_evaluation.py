"""Named evaluation sets, early stopping and the best save, in real runs; and every layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import JobResult, run_job, run_ranks
from tests.workshop import Workshop


def text(name: str) -> dict[str, Any]:
    return {"type": "TextDataLoader", "dataset_dir": f"corpus/{name}.py"}


def evaluation_set(name: str, file: str) -> dict[str, Any]:
    return {"name": name, "data_loader": text(file), "seq_length": 32, "packing": True}


SETS = [evaluation_set("near", "bisect"), evaluation_set("far", "shlex")]
OVERFITS: dict[str, Any] = {
    "do_eval": True,
    "eval_step_interval": 2,
    "eval_datasets": SETS,
    "train_dataset": {"data_loader": text("heapq")},
    "runner_config": {"epochs": 9, "max_steps": 30},
    "lr_schedule": {"learning_rate": 8e-2},
    "callbacks": [
        {"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_checkpoint_max": 2,
         "keep_best": True, "best_metric": "eval_loss/far"},
        {"type": "EarlyStopping", "metric": "eval_loss/far", "patience": 3},
    ],
}  # fmt: skip
"""A high rate on one file: the loss on another one soon rises."""


def run(workshop: Workshop, name: str, mode: str = "train", *more: str) -> JobResult:
    result = run_job(["--config", name, "--run_mode", mode, *more], workshop.folder)
    assert result.code == 0, result.stderr + result.stdout
    return result


def evaluations(workshop: Workshop, output: str) -> list[dict[str, Any]]:
    return [row for row in workshop.rows(output) if "eval_loss" in row]


def saves(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "checkpoint/manifest").glob("*.json"))


@pytest.fixture(scope="module")
def stopped(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A run that EarlyStopping has ended, in `alone`."""
    workshop = materials.copy_to(tmp_path_factory.mktemp("evaluation"))
    workshop.yaml(**OVERFITS)
    result = run(workshop, "run.yaml", "train", "--output_dir", "alone")
    (workshop.folder / "alone.log").write_text(result.stdout)
    return workshop


def test_a_run_ends_early_and_keeps_its_best_save(stopped: Workshop) -> None:
    rows, output = evaluations(stopped, "alone"), stopped.folder / "alone"
    last, losses = rows[-1]["step"], [row["eval_loss/far"] for row in rows]
    best = rows[losses.index(min(losses))]["step"]
    assert last == best + 6 < 30
    assert saves(output) == sorted(f"CKP-1_{step}" for step in (best, last - 2, last))
    record = json.loads((output / "checkpoint/best.json").read_text())
    assert record["save"] == f"CKP-1_{best}"
    assert record["value"] == min(losses)
    assert (output / "checkpoint" / record["file"]).is_file()
    assert f"the run ends after step {last} of 30" in (stopped.folder / "alone.log").read_text()


def test_rows_have_each_set_and_the_mean_over_all_tokens(stopped: Workshop) -> None:
    for row in evaluations(stopped, "alone"):
        tokens = [row[f"eval_tokens/{name}"] for name in ("near", "far")]
        losses = [row[f"eval_loss/{name}"] for name in ("near", "far")]
        assert row["eval_tokens"] == sum(tokens)
        mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
        assert row["eval_loss"] == pytest.approx(mean, rel=1e-12)
        assert row.keys() >= {"eval_perplexity", "eval_perplexity/near", "eval_perplexity/far"}


def test_eval_from_the_best_save_gives_its_row_again(stopped: Workshop) -> None:
    record = json.loads((stopped.folder / "alone/checkpoint/best.json").read_text())
    best = f"alone/checkpoint/{record['file']}"
    run(stopped, "run.yaml", "eval", "--output_dir", "evaluated", "--load_checkpoint", best)
    row = json.loads((stopped.folder / "evaluated/eval_result.json").read_text())
    newest = next(r for r in evaluations(stopped, "alone") if r["step"] == record["step"])
    assert row == {key: value for key, value in newest.items() if key not in ("step", "epoch")}


def test_resumed_runs_end_at_the_same_step_and_know_the_best_save(stopped: Workshop) -> None:
    rows = evaluations(stopped, "alone")
    best = json.loads((stopped.folder / "alone/checkpoint/best.json").read_text())
    last = rows[-1]["step"]
    # The end of a part is evaluated too, which does not count for early stopping.
    part = last - 3
    run(stopped, "run.yaml", "train", "--output_dir", "again", f"runner_config.stop_step={part}")
    (stopped.folder / "again/checkpoint/best.json").unlink()  # a crash before it was written
    run(stopped, "run.yaml", "resume", "--output_dir", "again")
    again = evaluations(stopped, "again")
    assert [row for row in again if row["step"] != part] == rows
    assert len(again) == len(rows) + 1
    assert json.loads((stopped.folder / "again/checkpoint/best.json").read_text()) == best
    # The configuration that is recorded differs in stop_step alone, which the newest save has not.
    assert stopped.saved("again", f"1_{last}") == stopped.saved("alone", f"1_{last}")
    ended = run(stopped, "run.yaml", "resume", "--output_dir", "again")
    assert f"nothing to do: step {last} of 30 is done, where EarlyStopping" in ended.stdout


LAYOUTS: dict[str, dict[str, int]] = {
    "tensor": {"model_parallel": 2},
    "pipeline": {"pipeline_stage": 2, "micro_batch_num": 2},
    "data": {"data_parallel": 2},
    "experts": {"data_parallel": 2, "expert_parallel": 2},
    "context": {"context_parallel": 2},
}
MODEL: dict[str, Any] = {
    "type": "Qwen3MoeConfig", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip


def evaluate_all(folder: str, names: list[str]) -> None:
    """One evaluation after the other, in the process group of this rank."""
    from launcher import modes
    from launcher.builders.job import Job
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.parallel import world as worlds
    from launcher.report.console import Console

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    for name in names:
        resolved = resolve_command_line(parse(["--config", name, "--run_mode", "eval"]))
        assert not resolved.problems, resolved.problems
        Path(resolved.config.output_dir).mkdir(exist_ok=True)
        job = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
        assert modes.evaluate_only(job) == 0
    worlds.stop()


def test_loss_and_perplexity_are_the_same_on_every_layout(workshop: Workshop) -> None:
    """`near` has 47 rows, which two ranks cannot share equally."""
    names = {}
    for layout, degrees in {"alone": {}, **LAYOUTS}.items():
        names[layout] = workshop.yaml(
            f"{layout}.yaml", output_dir=layout, model={"model_config": MODEL},
            eval_datasets=SETS, parallel_config=degrees, runner_config={"batch_size": 4},
        )  # fmt: skip
    run_ranks(1, evaluate_all, str(workshop.folder), [names.pop("alone")])
    run_ranks(2, evaluate_all, str(workshop.folder), list(names.values()))
    rows = {
        layout: json.loads((workshop.folder / layout / "eval_result.json").read_text())
        for layout in ("alone", *LAYOUTS)
    }
    for layout in LAYOUTS:
        assert rows[layout] == pytest.approx(rows["alone"], rel=1e-5), layout
