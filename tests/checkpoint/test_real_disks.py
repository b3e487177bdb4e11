"""Saves on real file systems that are full, read-only or not readable."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import commit
from launcher.checkpoint.catalog import published
from launcher.checkpoint.resume import choose
from launcher.checkpoint.space import SMALL_FILES_BYTES
from launcher.layout.mesh import Mesh
from tests import mounts
from tests.checkpoint import crew
from tests.ranks import _job, run_job, run_ranks
from tests.workshop import Workshop

ARGUMENTS = ["--config", "run.yaml", "--run_mode", "train"]
Outcome = tuple[int, str, str]


def in_own_mounts(function: Callable[..., Any], *arguments: object) -> Any:
    """`function` in a process with private mounts."""
    found = run_ranks(1, _apart, function, arguments)[0]
    if isinstance(found, mounts.NotAllowed):
        pytest.skip(f"this system gives a process no file systems of its own: {found}")
    return found


def _apart(function: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
    try:
        mounts.private()
    except mounts.NotAllowed as error:
        return error
    return function(*arguments)


def steps(root: Path) -> list[int]:
    return [found.manifest["global_step"] for found in published(root)]


def full_disk(
    folder: Path, nbytes: int, asked: bool
) -> tuple[Outcome, list[int], list[str], Outcome]:
    """A run on a disk of `nbytes`, what it left there, and the resumed run with more room."""
    small = folder / "small"
    mounts.small_disk(small, nbytes)
    plain = commit.room_for
    if not asked:
        commit.room_for = lambda root, nbytes: None
    first = _job(ARGUMENTS, str(folder))
    commit.room_for = plain
    left = steps(small / "checkpoint"), [p.name for p in small.rglob("*") if p.is_file()]
    mounts.resize(small, 100_000_000)
    return first, *left, _job([*ARGUMENTS, "--resume_training", "True"], str(folder))


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "found out"])
def test_a_full_disk_costs_the_saves_that_do_not_fit(workshop: Workshop, asked: bool) -> None:
    """Free space is checked before a save; where the check is wrong, the save fails."""
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 4, "directory": "small",
               "keep_checkpoint_max": 0}  # fmt: skip
    workshop.yaml(callbacks=[{**monitor, "directory": "plenty"}])
    assert run_job(ARGUMENTS, workshop.folder).code == 0
    expected = workshop.losses()
    save = workshop.folder / "plenty/checkpoint/rank_0/CKP_rank_0-1_4.safetensors"
    nbytes = int(2.5 * save.stat().st_size) + SMALL_FILES_BYTES * asked
    workshop.yaml(callbacks=[monitor])
    found = in_own_mounts(full_disk, workshop.folder, nbytes, asked)
    (code, out, err), kept, files, (again, _, trouble) = found
    assert code == 2, "the last save of a run that ends must be there"
    assert "warning: step 12 was not saved: the checkpoint could not be saved" in out
    assert ("no room" if asked else "No space left on device") in out
    assert "the checkpoint could not be saved" in err
    assert kept == [4, 8]
    assert not [name for name in files if "12" in name or "20" in name or ".tmp" in name]
    assert again == 0, trouble
    assert workshop.losses() == expected


TURNING = """
from pathlib import Path
from launcher.train.callbacks import Callback
from tests import mounts

class Turning(Callback):
    def on_steps_end(self, run, records):
        if records[-1].step == 8:
            mounts.read_only(Path("small").resolve())
        if records[-1].step == 13:
            mounts.writable(Path("small").resolve())
"""


def turning_disk(folder: Path) -> tuple[Outcome, list[int]]:
    mounts.small_disk(folder / "small", 50_000_000)
    return _job(ARGUMENTS, str(folder)), steps(folder / "small/checkpoint")


def test_a_disk_that_becomes_read_only_for_a_while(workshop: Workshop) -> None:
    (workshop.folder / "mine.py").write_text(TURNING)
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 5, "directory": "small"}
    workshop.yaml(callbacks=[monitor, {"type": "Turning"}], register_path="mine.py")
    (code, out, err), saved = in_own_mounts(turning_disk, workshop.folder)
    assert code == 0, err
    assert "warning: step 10 was not saved" in out
    assert "Read-only file system" in out
    assert saved == [5, 15, 20]


def read_only_store(folder: Path) -> tuple[Outcome, Outcome]:
    mounts.read_only(folder / "output")
    source = ["--resume_training", "True", "--load_checkpoint", "output/checkpoint"]
    inside = _job([*ARGUMENTS, *source], str(folder))
    return inside, _job([*ARGUMENTS, *source, "--output_dir", "elsewhere"], str(folder))


def test_a_run_reads_from_a_folder_that_nobody_may_write_to(workshop: Workshop) -> None:
    """Case X08 of the reference; no run starts in such a folder."""
    workshop.yaml(runner_config={"stop_step": 10, "batch_size": 8, "max_steps": 20})
    assert run_job(ARGUMENTS, workshop.folder).code == 0
    workshop.yaml()
    inside, elsewhere = in_own_mounts(read_only_store, workshop.folder)
    assert inside[0] == 2
    assert "Read-only file system" in inside[2]
    assert "output_dir" in inside[2]
    assert elsewhere[0] == 0, elsewhere[2]
    assert "resumed: CKP-1_10 of output/checkpoint" in elsewhere[1]
    assert steps(workshop.folder / "elsewhere/checkpoint") == [20]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(root: Path) -> tuple[str, list[str]]:
    if os.getuid() == 0:
        os.seteuid(65534)
    logged: list[str] = []
    chosen = choose(root, True, crew.ALONE, logged.append)
    return str(chosen and chosen.name), logged


@pytest.mark.parametrize("role", ["rank", "state", "manifest"])
def test_a_file_that_may_not_be_read_is_logged_and_skipped(open_folder: Path, role: str) -> None:
    for step in (1, 2):
        crew.save(open_folder, step, {"w": torch.ones(64)}, Mesh())
    paths = {"rank": "rank_0/CKP_rank_0-1_2.safetensors", "state": "state/CKP-1_2.json",
             "manifest": "manifest/CKP-1_2.json"}  # fmt: skip
    (open_folder / paths[role]).chmod(0)
    name, logged = run_ranks(1, as_nobody, open_folder)[0]
    assert name == "CKP-1_1"
    assert "skipped CKP-1_2" in logged[0]
    assert str(open_folder / paths[role]) in logged[0]
