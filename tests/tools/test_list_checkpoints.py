"""What the listing says of saves that are whole, damaged, unfinished, or not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import launcher.weights
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.store import Store
from launcher.layout.box import whole
from launcher.layout.mesh import Mesh
from launcher.parallel.world import World
from launcher.tools.list_checkpoints import main
from launcher.weights.reading.memory import Shard
from tests.tools.checkpoints import flip

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three saves, of 3 kB each, of the run in tmp_path/output."""
    root = tmp_path / "output" / "checkpoint"
    store = Store(root, "CKP", 0, 0)
    for step in (5, 10, 15):
        shards = {"w": Shard((64, 12), whole((64, 12)), torch.full((64, 12), float(step)))}
        name = SaveName("CKP", 0, 1, step)
        store.save(name, shards, {"global_step": step}, mesh=Mesh(), world=ALONE)
    return root


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
    assert all("1 rank (not cut)" in row and row.endswith("whole") for row in rows)
    assert [row.step for row in launcher.weights.list_checkpoints(root)] == [5, 10, 15]


def test_what_is_wrong_is_named(root: Path, capsys) -> None:
    file(root, 15).write_bytes(file(root, 15).read_bytes()[:-3])
    flip(root / "state" / "CKP-1_10.json", 5)
    rows = lines(root, capsys, code=1)[2:]
    assert rows[0].startswith(">")
    assert rows[0].endswith("whole")
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
    assert row.endswith("(w)")


def test_a_damaged_manifest_and_a_save_cut_short(root: Path, capsys) -> None:
    flip(root / "manifest" / "CKP-1_5.json", 20)
    (root / "manifest" / "CKP-1_15.json").rename(root / "manifest" / ".CKP-1_15.json.tmp")
    rows = "\n".join(lines(root, capsys, code=1)[2:])
    assert "CKP-1_5.json cannot be read or was changed" in rows
    assert "unfinished: the next start clears it away" in rows
    assert "> " in rows
    assert "CKP-1_10" in rows.partition("> ")[2].splitlines()[0]


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
