"""A missing rank file: replaced by replicas where there are some, never ignored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.tools import verify as verify_tool
from launcher.tools.unified_safetensors import main
from launcher.weights.formats.rank_metadata import inventory_of
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from tests.tools.checkpoints import held, tensors

COPIES = Mesh(dp_replicate=2)


def save(folder: Path, left_out: dict[int, set[str]], *, known: bool, once: bool) -> list[Path]:
    """Two ranks with all tensors but those in `left_out`; `known`: the files have an inventory."""
    named, files = tensors(), []
    all_of_it = inventory_of({name: tuple(tensor.shape) for name, tensor in named.items()})
    inventory = all_of_it if known else None
    for rank in range(2):
        path = folder / f"rank_{rank}" / f"CKP_rank_{rank}-1_1.safetensors"
        path.parent.mkdir(parents=True)
        shards = held(named, COPIES, rank, without=left_out.get(rank, set()))
        write_rank_file(
            path, shards, mesh=COPIES, rank=rank, remove_redundancy=once, inventory=inventory
        )
        files.append(path)
    return files


@pytest.mark.parametrize("known", [True, False], ids=["inventory", "no inventory"])
def test_a_tensor_that_only_the_lost_rank_held_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    ranks = tmp_path / "ranks"
    files = save(ranks, {0: {"norm"}, 1: {"proj", "embed"}}, known=known, once=True)
    assert set(open_rank_files(ranks, files).tensors) == set(tensors())
    shutil.rmtree(files[1].parent)
    with pytest.raises(
        UserError, match=r"rank 1 has no valid file in .*, and no other rank holds its parts"
    ):
        open_rank_files(ranks, files[:1])
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["--mindspore_ckpt_dir", str(ranks), *out]) == 2
    assert not (tmp_path / "out").exists()
    assert verify_tool.main([str(ranks)]) == 1
    said = capsys.readouterr().err
    assert said.count("and no other rank holds its parts") == 2
    if known:
        assert f"holds {len(tensors()) - 1} of {len(tensors())} tensors" in said


def test_copies_make_up_for_a_lost_rank(tmp_path: Path) -> None:
    files = save(tmp_path, {}, known=True, once=False)
    source = open_rank_files(tmp_path, files[1:])
    assert set(source.tensors) == set(tensors())
    assert "rank 0 has no valid file" in source.remarks[0]


def test_a_checker_never_calls_nothing_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank_0").mkdir()
    (tmp_path / "rank_0" / "notes.txt").write_text("no weights")
    for path in (tmp_path, tmp_path / "rank_0"):
        assert verify_tool.main([str(path)]) in (1, 2)
        said = capsys.readouterr()
        assert "whole" not in said.out


def test_other_names_that_begin_like_rank_folders_are_none(tmp_path: Path) -> None:
    from launcher.weights.source import detect

    folder = tmp_path / "rank_models"
    folder.mkdir()
    shutil.copy(save(tmp_path / "ranks", {}, known=True, once=False)[0], folder / "a.safetensors")
    (folder / "rank_table_2pcs.json").write_text("{}")
    assert detect(folder) == "complete"
    assert detect(folder / "a.safetensors") == "single"


def test_rank_files_of_torch_are_told_apart_from_damaged_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks/rank_0").mkdir(parents=True)
    torch.save({"a": torch.ones(2)}, tmp_path / "ranks/rank_0/a_rank_0-1_1.ckpt")
    assert main(["--mindspore_ckpt_dir", str(tmp_path / "ranks"), "--output_dir", "out"]) == 2
    assert verify_tool.main([str(tmp_path / "ranks")]) == 1
    said = capsys.readouterr().err
    assert said.count("is a file of torch: a file of safetensors is needed here") == 2
    assert said.count("Convert it: python -m launcher.tools.ckpt_to_safetensors") == 2
