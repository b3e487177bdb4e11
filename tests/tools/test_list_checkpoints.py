"""The rows of the listing for saves that are complete, damaged, unfinished, or missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import launcher.weights
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.store import Store
from launcher.layout.box import full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.world import World
from launcher.tools.list_checkpoints import main
from tests.checkpoint import crew
from tests.tools.checkpoints import flip

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three saves, of 3 kB each, of the run in tmp_path/output."""
    root = tmp_path / "output" / "checkpoint"
    for step in (5, 10, 15):
        save(root, step, ("w", "adam_m.w"))
    return root


def save(root: Path, step: int, tensors: Sequence[str]) -> None:
    shape = (32, 12)
    tensor = torch.full(shape, float(step))
    shards = {name: Shard(shape, full_box(shape), tensor) for name in tensors}
    state = {"global_step": step}
    name = SaveName("CKP", 0, 1, step)
    Store(root, "CKP", 0, 0).save(name, shards, state, mesh=Mesh(), world=ALONE)


def file(root: Path, step: int) -> Path:
    return root / "rank_0" / f"CKP_rank_0-1_{step}.safetensors"


def lines(root: Path, capsys, *options: str, code: int = 0) -> list[str]:
    assert main([str(root), *options]) == code
    return capsys.readouterr().out.splitlines()


def test_whole_saves_and_the_one_a_resume_takes(root: Path, capsys) -> None:
    first, header, *rows = lines(root.parent, capsys)
    assert first == f"{root}:"
    assert header.split() == ["name", "step", "size", "layout", "saved", "state"]
    assert [row.split()[:3] for row in rows] == [
        ["CKP-1_5", "5", "0.0"], ["CKP-1_10", "10", "0.0"], [">", "CKP-1_15", "15"],
    ]  # fmt: skip
    assert all("1 rank (not cut)" in row and row.endswith("complete") for row in rows)
    assert [row.step for row in launcher.weights.list_checkpoints(root)] == [5, 10, 15]


def test_what_is_wrong_is_named(root: Path, capsys) -> None:
    file(root, 15).write_bytes(file(root, 15).read_bytes()[:-3])
    flip(root / "state" / "CKP-1_10.json", 5)
    rows = lines(root, capsys, code=1)[2:]
    assert rows[0].startswith(">")
    assert rows[0].endswith("complete")
    assert "damaged: " in rows[1]
    assert "changed since it was saved" in rows[1]
    assert f"damaged: rank 0: {file(root, 15)} has" in rows[2]
    file(root, 15).unlink()
    assert f"rank 0: {file(root, 15)} is missing" in lines(root, capsys, code=1)[4]


def test_data_is_read_when_asked_for(root: Path, capsys) -> None:
    flip(file(root, 15))
    assert lines(root, capsys)[4].startswith(">")
    row = lines(root, capsys, "--verify", code=1)[4]
    assert "damaged: " in row
    assert row.endswith("(adam_m.w, w)")


def test_a_damaged_manifest_and_a_save_cut_short(root: Path, capsys) -> None:
    flip(root / "manifest" / "CKP-1_5.json", 20)
    (root / "manifest" / "CKP-1_15.json").rename(root / "manifest" / ".CKP-1_15.json.tmp")
    rows = "\n".join(lines(root, capsys, code=1)[2:])
    assert "CKP-1_5.json cannot be read or was changed" in rows
    assert "unfinished: being written, or left by a crash" in rows
    assert "> " in rows
    assert "CKP-1_10" in rows.partition("> ")[2].splitlines()[0]


def test_a_save_that_other_ranks_make_whole_is_what_a_resume_takes(tmp_path: Path, capsys) -> None:
    mesh, named = Mesh(dp_replicate=2), {"w": torch.ones(8), "adam_m.w": torch.ones(8)}
    crew.save(tmp_path, 1, named, mesh)
    crew.save(tmp_path, 2, named, mesh)
    (tmp_path / "rank_1" / "CKP_rank_1-1_2.safetensors").unlink()
    row = lines(tmp_path, capsys, code=1)[3]
    assert row.startswith(">")
    assert "damaged (a resume reads the replicas of other ranks): rank 1: " in row


def test_a_resume_takes_no_weights_alone(root: Path, capsys) -> None:
    save(root, 20, ("w",))
    assert not any(line.startswith(">") for line in lines(root, capsys))


def test_clocks_do_not_decide(root: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("launcher.checkpoint.commit.time.time", lambda: 1.0)
    save(root, 20, ("w", "adam_m.w"))
    assert lines(root, capsys)[-1].split()[:2] == [">", "CKP-1_20"]


def test_no_checkpoints(root: Path, capsys) -> None:
    nowhere = root.parent / "nowhere"
    assert main([str(nowhere)]) == 2
    assert f"{nowhere}: there is no such path" in capsys.readouterr().err
    assert main([str(root / "rank_0")]) == 2
    assert f"did you mean `{root}`?" in capsys.readouterr().err
    assert main([str(root), "--verfy"]) == 2
    assert "did you mean `--verify`?" in capsys.readouterr().err


def test_the_command_needs_no_torch(root: Path) -> None:
    code = (
        "import sys; from launcher.tools.list_checkpoints import main; "
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CKP-1_15" in done.stdout
