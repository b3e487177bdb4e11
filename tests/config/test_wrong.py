"""Wrong configurations and command lines: exit code 2, every mistake reported, torch not loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.families import DECODERS
from tests import messages
from tests.config.interpreter import REPOSITORY, Report, run_many
from tests.config.tables import (
    TRAIN,
    Row,
    combinations,
    evaluation,
    inputs,
    keys,
    layer_memory,
    layouts,
    mixtures,
    preferences,
)
from tests.config.workspace import RIGHT, build

TABLE = (
    *keys.TABLE, *combinations.TABLE, *inputs.TABLE, *layouts.TABLE, *layer_memory.TABLE,
    *mixtures.TABLE, *evaluation.TABLE, *preferences.TABLE,
)  # fmt: skip
WITH_NEAREST = [row for row in (*layouts.TABLE, *layer_memory.TABLE) if row.errors[0].near]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    """Every row run in one interpreter; rows of layouts also with each nearest value."""
    cases, counts = [], []
    for index, row in enumerate(TABLE):
        folder = build(tmp_path_factory.mktemp(f"case{index}"))
        fixed = row.fixed_cases(folder) if row in WITH_NEAREST else ()
        cases += [row.case(folder), *fixed]
        counts.append(len(cases))
    done = run_many(cases)
    starts = [0, *counts[:-1]]
    return {
        row.name: done[start:end] for row, start, end in zip(TABLE, starts, counts, strict=True)
    }


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_mistake_is_reported(row: Row, reports: dict[str, list[Report]]) -> None:
    report = reports[row.name][0]
    lines = [line for line in report.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(row.errors), report.err
    for line, error in zip(lines, row.errors, strict=True):
        error.check(line, row.text)
    assert (report.code, report.out) == (2, "")
    assert not report.torch_imported
    messages.check("config", row.name, report.err.replace(", ".join(DECODERS), "<all decoders>"))


@pytest.mark.parametrize("row", WITH_NEAREST, ids=lambda row: row.name)
def test_the_nearest_layout_is_accepted(row: Row, reports: dict[str, list[Report]]) -> None:
    fixed = reports[row.name][1:]
    assert [report.code for report in fixed] == [0] * len(row.errors[0].nearest), fixed


def test_the_golden_file_holds_the_table() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    messages.check_cases("config", [row.name for row in TABLE])


def test_the_right_configuration_is_right(tmp_path: Path) -> None:
    build(tmp_path)
    argv = ["--config", "right.yaml", *TRAIN, "--check_config"]
    (report,) = run_many([{"argv": argv, "cwd": str(tmp_path)}])
    assert (report.code, report.out) == (0, "right.yaml: the configuration is valid\n"), report.err
    assert not report.torch_imported


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--help"], 0, "--run_mode"),
        (["--config", "wrong.yaml", *TRAIN], 2, "did you mean `optimizer.weight_decay`?"),
        ([], 2, "`--config`"),
    ],
)
def test_the_real_command(tmp_path: Path, argv: list[str], code: int, says: str) -> None:
    build(tmp_path)
    (tmp_path / "wrong.yaml").write_text(RIGHT.replace("weight_decay", "weigth_decay"))
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "run.py"), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_other_ranks_report_with_their_rank(tmp_path: Path) -> None:
    """They wait for rank 0, whose launcher usually ends them first, and then report too."""
    build(tmp_path)
    (tmp_path / "wrong.yaml").write_text("qqq: 1\n")
    argv = ["--config", "wrong.yaml", *TRAIN]
    env = {"WORLD_SIZE": "2", "RANK": "1"}
    (report,) = run_many([{"argv": argv, "cwd": str(tmp_path), "env": env}])
    assert (report.code, report.out) == (2, "")
    assert report.err.startswith("[rank 1] error: wrong.yaml:1: unknown key `qqq`")
