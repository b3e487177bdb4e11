"""Only one run at a time uses a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.checkpoint import in_use as module
from launcher.checkpoint.in_use import in_use
from launcher.errors import UserError
from tests.checkpoint.crew import ALONE, together
from tests.workshop import Workshop


@pytest.fixture(autouse=True)
def impatient(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.0)


def test_a_second_run_is_refused_and_the_folder_is_free_again(tmp_path: Path) -> None:
    folders = [tmp_path / "out", tmp_path / "saves"]
    with in_use(folders, ALONE):
        for again in (folders, folders[1:]):
            with (
                pytest.raises(UserError, match="another run is using"),
                in_use(again, ALONE),
            ):
                pass
        with in_use([tmp_path / "other"], ALONE):
            pass
    with in_use(folders, ALONE):
        assert not [path for folder in folders for path in folder.iterdir()]


def test_the_ranks_of_one_run_share_the_lock(tmp_path: Path) -> None:
    def work(world: Any) -> str:
        with in_use([tmp_path], world):
            world.barrier()
            return "trained"

    assert together(3, work) == ["trained"] * 3


def test_a_refused_run_leaves_the_files_of_the_other_alone(
    workshop: Workshop, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(workshop.folder)
    name = workshop.yaml()
    with in_use([Path("output")], ALONE):
        Path("output/resolved.yaml").write_text("of the other run")
        assert cli.main(["--config", name, "--run_mode", "train"]) == 2
        assert "another run is using output" in capsys.readouterr().err
        assert Path("output/resolved.yaml").read_text() == "of the other run"
        assert "metrics.jsonl" not in os.listdir("output")
