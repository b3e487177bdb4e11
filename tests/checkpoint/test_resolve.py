"""The weights at a path: which save, with or without a manifest, and what is logged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launcher.checkpoint.names import SaveName
from launcher.checkpoint.resolve import open_weights
from launcher.checkpoint.resume import choose
from launcher.checkpoint.store import Store
from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.world import World
from launcher.weights.ranks.rank_file import write_rank_file
from tests.checkpoint import crew

ALONE = World(0, 1, torch.device("cpu"))
COPIES = Mesh(dp_replicate=2)


def save(root: Path, step: int, mesh: Mesh = COPIES, run: str = "") -> list[Path]:
    """What ranks save of a tensor: replicas, or shards where `mesh` splits it."""
    files = []
    for rank in range(mesh.world_size):
        rows = 4 // mesh.dp_shard
        box = Box((rank % mesh.dp_shard * rows,), (rows,))
        path = root / f"rank_{rank}" / f"CKP_rank_{rank}{run}-1_{step}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor = torch.full((rows,), float(step))
        write_rank_file(path, {"w": Shard((4,), box, tensor)}, mesh=mesh, rank=rank)
        files.append(path)
    return files


def opened(path: Path) -> tuple[set[str], list[str]]:
    """(files of the source, log lines)."""
    logged: list[str] = []
    source = open_weights(path, ALONE, logged.append)
    return {file.name for file in source.headers}, logged


def test_the_newest_save_by_name_and_a_file_for_its_save(tmp_path: Path) -> None:
    files = save(tmp_path, 9)
    save(tmp_path, 10)
    names, logged = opened(tmp_path)
    assert names == {f"CKP_rank_{rank}-1_10.safetensors" for rank in range(2)}
    assert logged == [f"{tmp_path}: checkpoint CKP-1_10"]
    assert opened(files[1])[0] == {file.name for file in files}


def test_a_lost_and_a_damaged_file_are_made_up_for_and_said(tmp_path: Path) -> None:
    mesh = Mesh(dp_replicate=3)
    files = save(tmp_path, 1, mesh)
    shutil.rmtree(files[1].parent)
    files[2].write_bytes(files[2].read_bytes()[:-1])
    names, logged = opened(tmp_path)
    assert names == {files[0].name}
    assert logged[0].startswith(f"{files[2]} is not a valid safetensors file")
    assert "ranks 1, 2 have no valid file; their parts are read from the ranks" in logged[1]


def test_what_nobody_else_holds_cannot_be_made_up_for(tmp_path: Path) -> None:
    files = save(tmp_path, 1, Mesh(dp_shard=2))
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path, ALONE, print)
    first, second = map(str, caught.value.problems)
    assert f"{files[1]} is not a valid safetensors file" in first
    assert "and no other rank holds its parts" in second


def test_two_runs_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    ours, theirs = save(tmp_path / "ours", 1), save(tmp_path / "theirs", 2)
    shutil.copy(theirs[1], ours[1])
    with pytest.raises(UserError, match=r"`w` differs in .*: these files are of two runs or steps"):
        open_weights(tmp_path / "ours", ALONE, print)


def test_weights_need_no_state_a_resume_does(tmp_path: Path) -> None:
    for step in (1, 2):
        store, name = Store(tmp_path, "CKP", 0, 5), SaveName("CKP", 0, 1, step)
        shards = {"w": Shard((4,), full_box((4,)), torch.ones(4))}
        store.save(name, shards, {"global_step": step}, mesh=Mesh(), world=ALONE)
    (tmp_path / "state/CKP-1_2.json").unlink()
    assert opened(tmp_path)[0] == {"CKP_rank_0-1_2.safetensors"}
    logged: list[str] = []
    chosen = choose(tmp_path, True, ALONE, logged.append)
    assert chosen is not None
    assert str(chosen.name) == "CKP-1_1"
    assert logged == [f"skipped CKP-1_2: {tmp_path}/state/CKP-1_2.json cannot be read"]


def test_a_damaged_manifest_is_passed_over_or_done_without(tmp_path: Path) -> None:
    crew.save(tmp_path, 1, {"w": torch.ones(4)}, COPIES)
    crew.save(tmp_path, 2, {"w": torch.ones(4)}, COPIES)
    manifests = [tmp_path / f"manifest/CKP-1_{step}.json" for step in (1, 2)]
    manifests[1].write_text("{")
    found, logged = opened(tmp_path)
    assert found == {"CKP_rank_0-1_1.safetensors", "CKP_rank_1-1_1.safetensors"}
    assert logged[0] == f"skipped CKP-1_2: {manifests[1]} is damaged"
    file = tmp_path / "rank_0/CKP_rank_0-1_2.safetensors"
    assert opened(file)[1] == [
        f"{manifests[1]} is damaged: the files of CKP-1_2 are found by their names",
        f"{file}: checkpoint CKP-1_2",
    ]
    assert len(opened(tmp_path / "rank_0/CKP_rank_0-1_1.safetensors")[1]) == 1
    manifests[0].unlink()
    assert opened(tmp_path)[1][0].endswith("the files of CKP-1_2 are found by their names")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nothing", "there is no such path"),
        ("saved/rank_0", "is the folder of one rank: pass the parent directory. did you mean"),
        ("old", "is not a valid .ckpt file of MindSpore"),
        ("empty", "has rank folders without weights"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, path: str, says: str) -> None:
    save(tmp_path / "saved", 1)
    for folder in ("old", "empty"):
        (tmp_path / folder / "rank_0").mkdir(parents=True)
    (tmp_path / "old/rank_0/x_rank_0-1_1.ckpt").write_bytes(b"\x0a\x18\x0a\x01w" + bytes(20))
    with pytest.raises(UserError, match=says):
        open_weights(tmp_path / path, ALONE, print)
