"""An interrupt while a folder is replaced loses neither the old one nor the new one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.weights.streaming import new_folder
from launcher.weights.streaming.new_folder import folder_aside


def replace(target: Path, source: Path, text: str) -> None:
    with folder_aside(target, source, overwrite=True) as scratch:
        (scratch / "file.json").write_text(text)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "source").mkdir()
    replace(tmp_path / "target", tmp_path / "source", "old")
    return tmp_path / "target", tmp_path / "source"


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_between_the_renames(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    target, source = places
    real, calls = os.replace, []

    def interrupted(origin: Path, goal: Path) -> None:
        calls.append(origin)
        if len(calls) == step:
            raise KeyboardInterrupt
        real(origin, goal)

    monkeypatch.setattr(new_folder.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(target, source, "new")
    monkeypatch.undo()
    assert (target / "file.json").read_text() == "old"
    replace(target, source, "new")
    assert (target / "file.json").read_text() == "new"
    assert sorted(path.name for path in target.parent.iterdir()) == ["source", "target"]


def test_a_kill_between_the_renames_is_mended_by_the_next_writer(
    places: tuple[Path, Path],
) -> None:
    target, source = places
    os.replace(target, target.with_name(".target.old.tmp"))
    with pytest.raises(ZeroDivisionError), folder_aside(target, source, overwrite=True):
        1 / 0  # noqa: B018
    assert (target / "file.json").read_text() == "old", "the old folder has its name again"
    shutil.copytree(target, target.with_name(".target.old.tmp"))
    replace(target, source, "new")
    assert sorted(path.name for path in target.parent.iterdir()) == ["source", "target"]


def test_a_link_loop_is_a_clear_error(places: tuple[Path, Path], tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="loop"):
        replace(loop, places[1], "new")


@pytest.mark.parametrize("name", ["notes.txt", "sub/a.json", ".git/config", "train.py"])
def test_a_folder_with_other_files_is_not_replaced(places: tuple[Path, Path], name: str) -> None:
    target, source = places
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("precious")
    with pytest.raises(UserError, match=str(target / name).split("/config")[0].split("/a.j")[0]):
        replace(target, source, "new")
    assert (target / name).read_text() == "precious"
    with folder_aside(target, source, overwrite=True, owned=True):
        pass
    assert list(target.iterdir()) == []


def test_the_current_directory_is_not_replaced(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (places[0] / "rank_0").mkdir()
    monkeypatch.chdir(places[0] / "rank_0")
    with pytest.raises(UserError, match="current directory"):
        replace(places[0], places[1], "new")
