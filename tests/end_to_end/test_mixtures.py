"""Mixtures in real jobs: losses of the sources on every layout, resumed runs, changed weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.builders.job import Job
from launcher.builders.run import fresh_run
from launcher.config.command_line import parse
from launcher.config.resolve import resolve_command_line
from launcher.parallel import world as worlds
from launcher.report.console import Console
from launcher.train.loop import train_steps
from tests.ranks import JobResult, run_job, run_ranks
from tests.workshop import Workshop

SOURCES = [
    {"type": "TextDataLoader", "dataset_dir": "prose", "weight": 0.5},
    {"type": "HFDataLoader", "dataset_files": "notes.jsonl", "weight": 0.3},
    {"type": "InstructionDataLoader", "dataset_files": "chat.jsonl", "weight": 0.2},
]
NAMES = ("chat", "notes", "prose")
STEPS = 8


@pytest.fixture(scope="module")
def mixture(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop with three more sources, and a run over them in `whole`."""
    workshop = materials.copy_to(tmp_path_factory.mktemp("mixture"))
    folder = workshop.folder
    texts = [path.read_text() for path in sorted((folder / "corpus").iterdir())]
    (folder / "prose").mkdir()
    (folder / "prose" / "one.txt").write_text(texts[0][:3000])
    (folder / "prose" / "two.txt").write_text(texts[1][:1500])
    _write_lines(folder / "notes.jsonl", [{"text": part} for part in texts[3].split("\n\n")])
    chat = [
        {"instruction": f"What is {n}?", "output": f"It is {n} " * (n % 5 + 1)} for n in range(40)
    ]
    _write_lines(folder / "chat.jsonl", chat)
    run(workshop, yaml_of(workshop, "one.yaml", **EVALUATED), 1, "whole")
    return workshop


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def yaml_of(workshop: Workshop, name: str, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "train_dataset": {"data_loader": SOURCES, "seq_length": 64},
        "runner_config": {"max_steps": STEPS, "batch_size": 8},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 4}],
        **changes,
    }
    return workshop.yaml(name, **settings)


def run(workshop: Workshop, name: str, world: int, output: str, *more: str) -> JobResult:
    arguments = ["--config", name, "--run_mode", "train", "--output_dir", output, *more]
    result = run_job(arguments, workshop.folder, world)
    assert result.code == 0, result.stderr + result.stdout
    return result


def rows_of(workshop: Workshop, output: str) -> list[dict[str, Any]]:
    """The rows of steps, without times and memory."""
    return [
        {key: value for key, value in row.items() if "second" not in key and "memory" not in key}
        for row in workshop.rows(output) if "loss" in row
    ]  # fmt: skip


def check_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            exact = key.startswith(("samples", "targets", "consumed"))
            assert row[key] == (value if exact else pytest.approx(value, rel=2e-5)), key


def layout(batch: int, micro: int = 1, **degrees: Any) -> dict[str, Any]:
    pipelined = degrees.get("pipeline_stage", 1) > 1
    runner = {"max_steps": STEPS, "batch_size": batch}
    if not pipelined:
        runner["gradient_accumulation_steps"] = micro
    else:
        degrees["micro_batch_num"] = micro
    return {"parallel_config": degrees, "runner_config": runner}


EXPERTS = {"model": {"model_config": {
    "type": "Qwen3MoeConfig", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "norm_topk_prob": True,
}}}  # fmt: skip
"""Changes that give the model experts."""
LAYOUTS = {
    "accumulated": (1, layout(2, 4)),
    "dp 2": (2, layout(4, data_parallel=2)),
    "tp 2": (2, layout(8, model_parallel=2)),
    "pp 2": (2, layout(4, 2, pipeline_stage=2)),
    "cp 2": (2, layout(8, context_parallel=2)),
    "dp 2, tp 2": (4, layout(2, 2, data_parallel=2, model_parallel=2)),
    "pp 2, tp 2": (4, layout(2, 4, pipeline_stage=2, model_parallel=2)),
}
MORE = {
    "a module of transformers": (1, {**layout(4, 2), "model": {"model_config": {
        "type": "GPTNeoXConfig", "num_key_value_heads": None, "head_dim": None,
        "tie_word_embeddings": False}}}),
    "experts": (1, {**layout(8), **EXPERTS}),
    "ep 2": (2, {**layout(4, data_parallel=2, expert_parallel=2), **EXPERTS}),
    "sharded, interleaved": (2, {
        **layout(2, 1, data_parallel=2), "micro_batch_interleave_num": 2,
        "parallel": {"enable_parallel_optimizer": True},
    }),
    "sinks": (1, {"runner_config": {
        "max_steps": STEPS, "batch_size": 8, "sink_mode": True, "sink_size": 4}}),
    "padded": (1, {"train_dataset": {
        "data_loader": SOURCES, "seq_length": 64, "packing": False}}),
    "padded, tp 2": (2, {**layout(8, model_parallel=2), "train_dataset": {
        "data_loader": SOURCES, "seq_length": 64, "packing": False}}),
}  # fmt: skip
SHORT = ("dp 2", "tp 2", "pp 2")
EVALUATED = {
    "do_eval": True,
    "eval_step_interval": 4,
    "eval_dataset": {
        "data_loader": [{k: v for k, v in s.items() if k != "weight"} for s in SOURCES],
        "seq_length": 64,
        "packing": True,
    },
}


def test_the_losses_of_sources_add_up(mixture: Workshop) -> None:
    rows = rows_of(mixture, "whole")
    assert len(rows) == STEPS
    for row in rows:
        parts = [row.get(f"loss/{n}", 0) * row[f"targets/{n}"] for n in NAMES]
        total = sum(row[f"targets/{n}"] for n in NAMES)
        assert sum(parts) == pytest.approx(row["loss"] * total, rel=1e-5)
        assert sum(row[f"samples/{n}"] for n in NAMES) == 8
        assert sum(row[f"consumed/{n}"] for n in NAMES) == row["consumed_samples"]
        for name, share in zip(NAMES, (0.2, 0.3, 0.5), strict=True):
            assert abs(row[f"consumed/{name}"] - share * row["consumed_samples"]) < 1
    evaluated = [row for row in mixture.rows("whole") if "eval_loss" in row]
    assert len(evaluated) == 2
    assert all(row.keys() >= {f"eval_loss/{name}" for name in NAMES} for row in evaluated)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SHORT, id="one axis"),
        pytest.param([n for n in LAYOUTS if n not in SHORT], id="more", marks=pytest.mark.long),
    ],
)
def test_the_losses_of_sources_are_equal_on_every_layout(mixture: Workshop, names) -> None:
    evaluated = [row for row in mixture.rows("whole") if "eval_loss" in row]
    for name in names:
        world, changes = LAYOUTS[name]
        run(mixture, yaml_of(mixture, "other.yaml", **EVALUATED, **changes), world, name)
        check_same(rows_of(mixture, name), rows_of(mixture, "whole"))
        found = [row for row in mixture.rows(name) if "eval_loss" in row]
        for row, other in zip(found, evaluated, strict=True):
            assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("whole", "sharded, interleaved"),
        ("whole", "sinks"),
        ("experts", "ep 2"),
        ("padded", "padded, tp 2"),
        ("a module of transformers", "a module of transformers"),
    ],
)
def test_further_models_and_settings(mixture: Workshop, one: str, other: str) -> None:
    for name in {one, other} - {"whole"}:
        world, changes = MORE[name]
        run(mixture, yaml_of(mixture, "more.yaml", **changes), world, name)
    check_same(rows_of(mixture, other), rows_of(mixture, one))
    for row in rows_of(mixture, other):
        parts = [row.get(f"loss/{n}", 0) * row[f"targets/{n}"] for n in NAMES]
        total = sum(row[f"targets/{n}"] for n in NAMES)
        assert sum(parts) == pytest.approx(row["loss"] * total, rel=1e-5)


def test_evaluation_reports_each_source(mixture: Workshop) -> None:
    result = run_job(
        ["--config", "one.yaml", "--run_mode", "eval", "--output_dir", "evaluated",
         "--load_checkpoint", "whole/checkpoint"], mixture.folder,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    row = json.loads((mixture.folder / "evaluated/eval_result.json").read_text())
    newest = [row for row in mixture.rows("whole") if "eval_loss" in row][-1]
    assert row == pytest.approx({key: newest[key] for key in row}, rel=1e-6)
    assert row.keys() >= {f"eval_loss/{name}" for name in NAMES}


def test_losses_are_those_of_a_plain_computation(mixture: Workshop) -> None:
    name = yaml_of(mixture, "plain.yaml", **layout(2, 4))
    ((found, expected),) = run_ranks(1, _plain_losses, str(mixture.folder), name)
    assert found == pytest.approx(expected, rel=1e-5)


def _plain_losses(folder: str, name: str) -> tuple[dict[str, float], dict[str, float]]:
    """The losses of the sources in the first step, and the same row by row from the logits."""
    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    resolved = resolve_command_line(parse(["--config", name, "--output_dir", "plain"]))
    run = fresh_run(Job(resolved.config, resolved.provenance, world, Console(enabled=False)), None)
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for batch in run.loader.step(0).batches:
        packed = {"position_ids": batch.position_ids, "document_ids": batch.document_ids}
        with torch.no_grad():
            logits = run.model.parts.modules[0](batch.input_ids, **packed)
        assert batch.sources is not None
        for row, source in enumerate(batch.sources.int().argmax(1).tolist()):
            targets = batch.labels[row]
            kept = targets != -100
            losses[NAMES[source]].append(
                torch.nn.functional.cross_entropy(
                    logits[row][kept], targets[kept], reduction="none"
                )
            )
    ((record,), _) = train_steps(run)
    run.loader.close()
    worlds.stop()
    found = {source.name: float(source.loss or 0) for source in record.sources}
    return found, {name: float(torch.cat(parts).mean()) for name, parts in losses.items()}


def test_a_stopped_run_is_the_uninterrupted_one(mixture: Workshop) -> None:
    """Bitwise on the same number of ranks; on others the same samples and losses."""
    stopped = ("--runner_config.stop_step", "4")
    run(mixture, "one.yaml", 1, "parts", *stopped)
    shutil.copytree(mixture.folder / "parts", mixture.folder / "moved")
    run(mixture, "one.yaml", 1, "parts", "--resume_training", "True")
    assert mixture.saved("parts", f"1_{STEPS}") == mixture.saved("whole", f"1_{STEPS}")
    assert rows_of(mixture, "parts") == rows_of(mixture, "whole")
    two = yaml_of(mixture, "two.yaml", **EVALUATED, **layout(4, data_parallel=2))
    run(mixture, two, 2, "moved", "--resume_training", "True")
    check_same(rows_of(mixture, "moved"), rows_of(mixture, "whole"))
    assert mixture_of(mixture, "moved") == mixture_of(mixture, "whole")


@pytest.mark.long
def test_a_run_moves_over_many_ranks(mixture: Workshop) -> None:
    """Stopped after odd steps, resumed on four ranks, then two, then in a pipeline of two."""
    layouts = [(3, 4, layout(2, data_parallel=4)), (5, 2, layout(4, model_parallel=2, micro=2)),
               (STEPS, 2, layout(4, 2, pipeline_stage=2))]  # fmt: skip
    for stop, world, changes in layouts:
        name = yaml_of(mixture, "far.yaml", **EVALUATED, **changes)
        more = ("--resume_training", "True", "--runner_config.stop_step", str(stop))
        run(mixture, name, world, "far", *more)
    check_same(rows_of(mixture, "far"), rows_of(mixture, "whole"))
    assert mixture_of(mixture, "far") == mixture_of(mixture, "whole")


def mixture_of(workshop: Workshop, output: str, step: int = STEPS) -> dict[str, Any]:
    (path,) = (workshop.folder / output / "checkpoint/state").glob(f"*-1_{step}.json")
    return json.loads(path.read_text())["data"]["mixture"]


def test_changed_weights_continue_after_the_samples_taken(mixture: Workshop) -> None:
    shutil.copytree(mixture.folder / "whole", mixture.folder / "changed")
    again = ("--resume_training", "True", "--max_steps", "12")
    weights = [f"train_dataset.data_loader.{n}.weight={w}" for n, w in enumerate((0.25, 0.5, 0.25))]
    result = run(mixture, "one.yaml", 1, "changed", *again, *weights)
    for name, change in zip(NAMES, ("0.2 -> 0.25", "0.3 -> 0.5", "0.5 -> 0.25"), strict=True):
        assert f"{name}: {change}" in result.stdout
    rows = rows_of(mixture, "changed")
    assert rows[:STEPS] == rows_of(mixture, "whole")
    for row in rows[STEPS:]:
        for name, share in zip(NAMES, (0.25, 0.5, 0.25), strict=True):
            since = row[f"consumed/{name}"] - rows[STEPS - 1][f"consumed/{name}"]
            assert abs(since - share * (row["consumed_samples"] - 8 * STEPS)) < 1
    first, second = mixture_of(mixture, "changed", 12)["segments"]
    assert first == mixture_of(mixture, "whole")["segments"][0]
    assert second["from_sample"] == 8 * STEPS
    assert second["taken"] == {name: rows[STEPS - 1][f"consumed/{name}"] for name in NAMES}


def test_other_data_is_an_error_that_names_the_source(mixture: Workshop) -> None:
    shutil.copytree(mixture.folder / "whole", mixture.folder / "refused")
    more = ["--config", "one.yaml", "--run_mode", "train", "--output_dir", "refused",
            "--resume_training", "True", "--max_steps", "9"]  # fmt: skip
    short = run_job([*more, "train_dataset.data_loader.1.num_samples=5"], mixture.folder)
    assert short.code == 2
    assert "source `notes` is not that of the checkpoint" in short.stderr
    renamed = run_job([*more, "train_dataset.data_loader.1.name=papers"], mixture.folder)
    assert renamed.code == 2
    assert "source `papers` has the data of `notes`" in renamed.stderr
    single = run_job(
        [*more, "train_dataset.data_loader={type: TextDataLoader, dataset_dir: prose}"],
        mixture.folder,
    )
    assert single.code == 2
    assert "train_dataset.data_loader: a mixture -> one source" in single.stderr
    assert "ignore_data_skip" in single.stderr
    weights = "train_dataset.data_loader.0.weight=0.1"
    run(mixture, "one.yaml", 1, "refused", *more[6:], "--ignore_data_skip", "True", weights)
    (segment,) = mixture_of(mixture, "refused", 9)["segments"]
    assert (segment["from_sample"], segment["taken"]) == (0, {})
