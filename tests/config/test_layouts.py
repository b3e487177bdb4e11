"""Layouts: what is possible, what is probably not meant, and the numbers that follow from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config import derived, rules
from launcher.config.checks.pipeline import corrected
from launcher.config.resolve import resolve
from launcher.config.schema import Config
from launcher.environment import PLANNED_WORLD_SIZE
from models.families import model_spec
from tests import messages
from tests.config.tables import Row
from tests.config.tables.layouts import SIZES
from tests.messages import nearest

PIPELINE = "parallel.pipeline_config"
PIPELINE_YAML = "parallel: {pipeline_config: "


def written(degrees: str = "", add: str = "", replace: dict[str, str] | None = None) -> None:
    """Write x.yaml: the right configuration with larger sizes, these degrees and lines."""
    row = Row(name="", degrees=degrees, add=add, replace=SIZES | (replace or {}), errors=())
    Path("x.yaml").write_text(row.text)


POSSIBLE = [
    "data_parallel: 4",
    "model_parallel: 2, use_seq_parallel: True, vocab_emb_dp: False",
    "model_parallel: 8",  # more ranks than key/value heads: these are repeated
    "context_parallel: 4",
    "context_parallel: 4, context_parallel_algo: ulysses",
    "context_parallel: 8, context_parallel_algo: hybrid_cp, ulysses_degree_in_cp: 2",
    "pipeline_stage: 3, micro_batch_num: 5",
    "pipeline_stage: 4, micro_batch_num: 4",  # six layers
    "data_parallel: 2, model_parallel: 2, pipeline_stage: 2, context_parallel: 2, "
    "micro_batch_num: 4, micro_batch_interleave_num: 2",
]


@pytest.mark.parametrize("degrees", POSSIBLE)
def test_possible_layouts(workspace: Path, degrees: str) -> None:
    written(degrees)
    assert problems("x.yaml") == []


def problems(name: str, mode: str = "train", world: int | None = None, *words: str) -> list[str]:
    result = resolve(name, mode, overrides=words)
    found = rules.check(result.config, result.provenance, world=world, bad_keys=result.bad_keys)
    return [str(problem) for problem in (*result.problems, *found)]


@pytest.mark.parametrize(
    ("degrees", "processes", "expected"),
    [
        ("data_parallel: auto", None, 1),
        ("data_parallel: auto", 4, 4),
        ("data_parallel: auto, model_parallel: 2", 8, 4),
        ("data_parallel: auto, model_parallel: 2, pipeline_stage: 2, micro_batch_num: 2", 8, 2),
    ],
)
def test_data_parallel_from_the_number_of_processes(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, degrees: str, processes: int | None,
    expected: int,
) -> None:  # fmt: skip
    if processes is not None:
        monkeypatch.setenv(PLANNED_WORLD_SIZE, str(processes))
    written(degrees)
    assert resolve("x.yaml", "train").config.parallel_config.data_parallel == expected
    assert problems("x.yaml", world=processes) == []


def test_processes_that_the_other_degrees_do_not_divide(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLANNED_WORLD_SIZE, "6")
    written("data_parallel: auto, model_parallel: 4")
    (text,) = problems("x.yaml", world=6)
    assert "this job has 6" in text


def test_one_process_writes_the_strategy_of_any_layout(workspace: Path) -> None:
    written("data_parallel: 2, model_parallel: 4", "only_save_strategy: True\n")
    assert problems("x.yaml", world=1) == []
    assert problems("x.yaml", world=8) == []
    (text,) = problems("x.yaml", world=4)
    assert "data_parallel 2 x model_parallel 4 = 8 processes" in text


PREDICTS = {
    "heads": ("model_parallel: 3", 3, "model_parallel = 3: ", ("2", "4")),
    "stages": ("pipeline_stage: 7", 7, "pipeline_stage = 7: ", ("6",)),
    "a dense model": ("data_parallel: 2, expert_parallel: 2", 2, "expert_parallel = 2: ", ("1",)),
    "stage_layers": (
        "pipeline_stage: 2", 2, "parallel.pipeline_config.stage_layers = [1, 2]: ", ("[3, 3]",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREDICTS)
def test_layouts_that_predict_refuses(workspace: Path, name: str) -> None:
    degrees, world, says, near = PREDICTS[name]
    more = "parallel: {pipeline_config: {stage_layers: [1, 2]}}\n" if name == "stage_layers" else ""
    written(degrees, more)
    (text,) = problems("x.yaml", "predict", world, "input_data=hello")
    assert text.startswith("x.yaml:")
    assert says in text
    assert nearest(text) == near


def test_predict_needs_neither_micro_batches_nor_pieces_of_rows(workspace: Path) -> None:
    words = ["input_data=hello"]
    written("pipeline_stage: 2")
    assert problems("x.yaml", "predict", 2, *words) == []
    written("context_parallel: 2", "parallel: {enable_parallel_optimizer: True}\n")
    assert problems("x.yaml", "predict", 2, *words) == []
    result = resolve("x.yaml", "predict", overrides=words)
    (warning,) = rules.warnings(result.config, result.provenance)
    assert warning.startswith("x.yaml:45: parallel_config.context_parallel: ")
    messages.check("layouts", "predict with context_parallel", warning)


def test_evaluation_is_laid_out_too(workspace: Path) -> None:
    eval_dataset = "eval_dataset: {data_loader: {dataset_dir: corpus}, seq_length: 36}\n"
    written("context_parallel: 4", eval_dataset)
    (text,) = problems("x.yaml", "eval")
    assert "eval_dataset.seq_length = 36: " in text
    assert problems("x.yaml", "train") == []
    (text,) = problems("x.yaml", "train", None, "do_eval=true")
    assert "eval_dataset.seq_length = 36" in text


def test_rows_of_the_default_length(workspace: Path) -> None:
    written("context_parallel: 3", replace={"  seq_length: 64\n": ""})
    (text,) = problems("x.yaml")
    assert text.startswith("x.yaml:19: train_dataset.seq_length = 128: ")
    assert nearest(text) == ("126",)


def warned(add: str, degrees: str = "") -> list[str]:
    written(degrees, add)
    result = resolve("x.yaml", "train")
    return rules.warnings(result.config, result.provenance)


@pytest.mark.parametrize(
    ("degrees", "add", "says"),
    [
        ("use_seq_parallel: True", "", "parallel_config.use_seq_parallel: no effect without model"),
        ("micro_batch_num: 4", "", "parallel_config.micro_batch_num: no effect without a pipeline"),
        (
            "",
            "parallel: {pipeline_config: {pipeline_scheduler: zero_bubble_v}}\n",
            "no effect without a pipeline",
        ),
        (
            "",
            "parallel: {pipeline_config: {stage_layers: [6]}}\n",
            "stage_layers: no effect without a pipeline",
        ),
        (
            "context_parallel: 4, ulysses_degree_in_cp: 2",
            "",
            "parallel_config.ulysses_degree_in_cp: ",
        ),
        ("", "swap_config: {layer_swap: [{layers: [0]}]}\n", "no effect without swap: True"),
    ],
)
def test_layouts_probably_not_meant(workspace: Path, degrees: str, add: str, says: str) -> None:
    (text,) = warned(add, degrees)
    assert text.startswith("x.yaml:45: ")
    assert says in text
    messages.check("layouts", f"warning for {degrees}{add}".strip(), text)


# --- what follows from a layout -------------------------------------------------------------------


def config(*words: str) -> Config:
    written()
    return resolve("x.yaml", "train", overrides=words).config


STAGES_2 = "parallel_config.pipeline_stage=2"


@pytest.mark.parametrize(
    ("words", "schedule", "stages"),
    [
        ([], "1f1b", 1),
        ([STAGES_2], "1f1b", 1),
        ([STAGES_2, f"{PIPELINE}.pipeline_interleave=true"], "interleaved_1f1b", 2),
        ([f"{PIPELINE}.pipeline_interleave=true"], "interleaved_1f1b", 1),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=gpipe",
          f"{PIPELINE}.pipeline_interleave=true"], "gpipe", 2),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=zero_bubble_v"], "zero_bubble_v", 2),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=interleaved_zero_bubble",
          "+model.model_config.pp_interleave_num=3"], "interleaved_zero_bubble", 3),
    ],
)  # fmt: skip
def test_schedules_and_stages(
    workspace: Path, words: list[str], schedule: str, stages: int
) -> None:
    found = config(*words)
    assert derived.pipeline_schedule(found) == schedule
    assert derived.stages_per_rank(found) == stages


@pytest.mark.parametrize(
    ("words", "offsets", "counts"),
    [
        ([STAGES_2], None, None),
        (["+model.model_config.offset=[1,-1]"], None, None),
        ([STAGES_2, "+model.model_config.offset=0"], None, None),
        ([STAGES_2, "+model.model_config.offset=[1,-1]"], [1, -1], [4, 2]),
        ([STAGES_2, "+model.model_config.offset=[[1,-1]]"], [1, -1], [4, 2]),
        ([STAGES_2, f"{PIPELINE}.pipeline_interleave=true",
          "+model.model_config.offset=[[0,1],[1,0]]"], [0, 1, 1, 0], [1, 2, 2, 1]),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=zero_bubble_v",
          "+model.model_config.offset=[[0,1],[0,1]]"], [0, 1, 1, 0], [1, 2, 2, 1]),
        ([STAGES_2, f"{PIPELINE}.stage_layers=[2,4]"], None, [2, 4]),
    ],
)  # fmt: skip
def test_layers_of_each_stage(workspace: Path, words: list[str], offsets: Any, counts: Any) -> None:
    found = config(*words)
    assert derived.stage_offsets(found) == offsets
    assert derived.stage_counts(found, 6) == counts


@pytest.mark.parametrize(
    ("words", "algorithm", "inner", "unit"),
    [
        ([], "ring", 1, 1),
        (["context_parallel=4"], "ring", 1, 8),
        (["context_parallel=4", "context_parallel_algo=ring"], "ring", 1, 8),
        (["context_parallel=4", "context_parallel_algo=ulysses"], "ulysses", 4, 4),
        (["context_parallel=4", "context_parallel_algo=ulysses_cp"], "ulysses", 4, 4),
        (["context_parallel=4", "context_parallel_algo=hybird_cp",
          "ulysses_degree_in_cp=2"], "hybrid", 2, 8),
        (["context_parallel=2", "model_parallel=6", "use_seq_parallel=true"], "ring", 1, 12),
        (["model_parallel=4", "use_seq_parallel=true"], "ring", 1, 4),
    ],
)  # fmt: skip
def test_ways_to_share_a_sequence(
    workspace: Path, words: list[str], algorithm: str, inner: int, unit: int
) -> None:
    found = config(*(f"parallel_config.{word}" for word in words))
    assert derived.context_algorithm(found) == algorithm
    assert derived.ulysses_degree(found) == inner
    assert derived.row_unit(found) == unit


@pytest.mark.parametrize(
    ("counts", "layers", "expected"),
    [
        ([1, 1, 1], 3, [1, 1, 1]),
        ([1, 1, 1], 5, [2, 2, 1]),
        ([9, 1], 4, [3, 1]),
        ([4, -4], 6, [4, 2]),
        ([10**9, 1], 6, [5, 1]),
    ],
)
def test_corrected_counts(counts: list[int], layers: int, expected: list[int]) -> None:
    assert corrected(counts, layers) == expected


def test_the_family_with_experts_has_a_decoder() -> None:
    spec = model_spec({"type": "Qwen3MoeConfig"}, None)
    assert spec.decoder is not None
    assert spec.decoder.experts is not None
