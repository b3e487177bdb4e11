"""YAML in the styles of MindFormers runs as it is, and so does what `--migrate` makes of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.config.command_line import parse
from launcher.config.model_spelling import in_hub_spelling
from launcher.config.resolve import EVALUATION_READS_ALL, resolve_command_line
from tests.mindspore.yaml_fixtures import FOLDER, RUNS, Run, prepare, write_weights
from tests.ranks import run_ranks
from tests.workshop import Workshop

_MIGRATED = (
    *("eager_qwen3_train", "legacy_common_loader", "legacy_llama3_1_finetune"),
    *("legacy_qwen2_5_finetune", "mcore_qwen3_alpaca"),
)
"""Files whose migrated form is run too."""


def migrated(run: Run) -> list[str]:
    """The command line of the file that `--migrate` writes of a run."""
    return ["--config", f"migrated_{run.name}.yaml", "--output_dir", f"out_migrated_{run.name}"]


def _main(argv: list[str]) -> tuple[int, str, str]:
    from launcher import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    return code, out.getvalue(), err.getvalue()


def _run_all(folder: str) -> dict[str, tuple[int, str, str]]:
    """Every file migrated and run, in one process: name to exit code, output and errors."""
    os.chdir(folder)
    write_weights(Path(folder))
    done = {}
    for run in RUNS:
        done[f"migrate {run.name}"] = code, text, _ = _main([*run.argv, "--migrate"])
        Path(f"migrated_{run.name}.yaml").write_text(text)
        done[run.name] = _main(run.argv)
        if code == 0 and run.name in _MIGRATED:
            done[f"migrated {run.name}"] = _main(migrated(run))
    return done


@pytest.fixture(scope="module")
def folder(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("yaml") / "work"
    prepare(materials, place)
    return place


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Any]:
    return run_ranks(1, _run_all, str(folder))[0]


def losses(folder: Path, name: str) -> list[float]:
    rows = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [row.get("loss", row.get("eval_loss")) for row in rows]


def test_every_file_is_run() -> None:
    assert sorted(run.name for run in RUNS) == sorted(file.stem for file in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_file_runs(run: Run, done: dict[str, Any], folder: Path) -> None:
    code, out, err = done[run.name]
    assert code == 0, err + out
    if run.rows > 0:
        assert len(losses(folder, f"out_{run.name}")) == run.rows
    elif run.rows < 0:
        assert "perplexity" in out
    else:
        assert (folder / f"out_{run.name}" / "text_generation_result.jsonl").stat().st_size > 0


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_migrated_file_is_the_same_configuration(
    run: Run, done: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, err = done[f"migrate {run.name}"]
    assert code == 0, err
    monkeypatch.chdir(folder)
    old = resolve_command_line(parse(run.argv))
    new = resolve_command_line(parse(["--config", f"migrated_{run.name}.yaml"]))
    assert not new.problems, text
    assert new.config == in_hub_spelling(old.config)
    assert not new.changes, text
    assert set(new.no_effect) <= set(EVALUATION_READS_ALL), text


@pytest.mark.parametrize("name", _MIGRATED)
def test_the_migrated_file_runs_to_the_same_losses(
    name: str, done: dict[str, Any], folder: Path
) -> None:
    code, _, err = done[f"migrated {name}"]
    assert code == 0, err
    assert losses(folder, f"out_migrated_{name}") == losses(folder, f"out_{name}")
