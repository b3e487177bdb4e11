"""Which rank files belong together, and which save is the newest, by names and manifests alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.weights.ranks.rank_folders import first_file, newest, newest_manifest, save_of, saves


def fill(root: Path, *names: str, ranks: int = 2) -> None:
    """Empty files; `{}` in a name is the rank."""
    for rank in range(ranks):
        (root / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / f"rank_{rank}" / name.format(rank)).touch()


@pytest.mark.parametrize(
    ("names", "label", "order"),
    [
        (["CKP_rank_{}-1_9.safetensors", "CKP_rank_{}-1_10.safetensors"], "CKP-1_10", (0, 1, 10)),
        (["CKP_rank_{}-2_1.safetensors", "CKP_rank_{}-1_10.safetensors"], "CKP-2_1", (0, 2, 1)),
        (["CKP_rank_{}-9_9.safetensors", "CKP_rank_{}_1-1_1.safetensors"], "CKP_1-1_1", (1, 1, 1)),
        (["net_rank_{}-network-1_4.safetensors"], "net-network-1_4", (0, 1, 4)),
        (["qwen2_7b_rank_{}.safetensors"], "qwen2_7b", (0, 0, 0)),
        (["example-1_1.safetensors"], "example-1_1", (0, 1, 1)),
        (["a_rank_1_rank_{}-1_1.safetensors"], "a_rank_1-1_1", (0, 1, 1)),
        (["x_rank_{}-1_2.ckpt", "x_rank_{}-1_1.safetensors", "meta.json"], "x-1_2", (0, 1, 2)),
        (["x_rank_{}-1_2.ckpt.tmp", "x_rank_{}-1_1.safetensors"], "x-1_1", (0, 1, 1)),
        (["x_rank_{}-1_1.ckpt", "x_rank_{}-1_1.safetensors"], "x-1_1", (0, 1, 1)),
        (["x_rank_{}-1_1.safetensors", ".x_rank_{}-1_2.safetensors"], "x-1_1", (0, 1, 1)),
    ],
)
def test_the_newest_by_name(tmp_path: Path, names: list[str], label: str, order) -> None:
    fill(tmp_path, *names, ranks=12)
    for path in tmp_path.glob("*/*"):  # what is oldest by time is taken all the same
        os.utime(path, (1, 1) if label in path.name else None)
    save = newest(tmp_path)
    assert (save.label, save.order) == (label, order)
    assert [file.parent.name for file in save.in_rank_order] == [f"rank_{r}" for r in range(12)]
    assert save_of(save.in_rank_order[3]) == save


def test_names_that_do_not_say_which_is_newest(tmp_path: Path) -> None:
    fill(tmp_path, "a_rank_{}-1_5.safetensors", "b_rank_{}-1_5.safetensors")
    with pytest.raises(UserError, match=r"holds 2 saves: a-1_5, b-1_5: their names do not show"):
        newest(tmp_path)
    assert first_file(tmp_path) is None
    assert save_of(tmp_path / "rank_1/b_rank_1-1_5.safetensors").label == "b-1_5"


def test_folders_without_weights(tmp_path: Path) -> None:
    fill(tmp_path, "meta.json")
    (tmp_path / "rank_x").mkdir()
    assert saves(tmp_path) == []
    with pytest.raises(UserError, match="has rank folders without weights"):
        newest(tmp_path)
    with pytest.raises(UserError, match="is not in a rank folder"):
        save_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{", '{"version": 1, "sequence": "x"}',
     '{"version": 1, "sequence": 9, "world_size": 2, "files": []}',
     '{"version": 1, "sequence": 9, "world_size": 1, "files": 3}'],
)  # fmt: skip
def test_the_newest_manifest_is_the_highest_sequence_that_can_be_read(
    tmp_path: Path, damage: str
) -> None:
    fill(tmp_path, "CKP_rank_{}-1_9.safetensors", "CKP_rank_{}-1_10.safetensors")
    (tmp_path / "manifest").mkdir()
    for sequence, name in ((2, "1_9"), (1, "1_10")):
        files = [{"file": f"rank_{r}/CKP_rank_{r}-{name}.safetensors"} for r in range(2)]
        content = {"version": 1, "sequence": sequence, "world_size": 2, "files": files}
        (tmp_path / f"manifest/CKP-{name}.json").write_text(json.dumps(content))
    (tmp_path / "manifest/other.json").write_text(damage)
    found = newest_manifest(tmp_path)
    assert found is not None
    assert found["sequence"] == 2
    assert first_file(tmp_path) == tmp_path / "rank_0/CKP_rank_0-1_9.safetensors"


@pytest.mark.parametrize("file", ["../rank_0/x", "rank_0/../../x", "/etc/passwd", 3, None])
def test_a_manifest_cannot_point_elsewhere(tmp_path: Path, file: object) -> None:
    fill(tmp_path, "CKP_rank_{}-1_9.safetensors", ranks=1)
    (tmp_path / "manifest").mkdir()
    content = {"version": 1, "sequence": 1, "world_size": 1, "files": [{"file": file}]}
    (tmp_path / "manifest/CKP-1_9.json").write_text(json.dumps(content))
    assert first_file(tmp_path) == tmp_path / "rank_0/CKP_rank_0-1_9.safetensors"
