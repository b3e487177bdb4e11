"""Rank files become complete weights, bit for bit; what does not belong together is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import launcher.weights
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.tools.unified_safetensors import main
from launcher.weights.offline.merge import size_in_bytes
from launcher.weights.source import open_complete
from tests.mindspore.golden import ALL, needs_all
from tests.tools.checkpoints import content, flip, manifest, same, save, tensors

MESHES = {
    "one rank": Mesh(),
    "uneven shards": Mesh(dp_shard=3),
    "copies": Mesh(dp_replicate=2, tp=2),
    "all axes": Mesh(dp_replicate=2, dp_shard=2, tp=2),
}


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """The save 1_1 of eight ranks, with copies."""
    save(tmp_path / "ranks", tensors(), MESHES["all axes"])
    return tmp_path / "ranks"


def merge(ranks: Path, *more: str) -> int:
    out = str(ranks.parent / "out")
    return main(["--mindspore_ckpt_dir", str(ranks), "--output_dir", out, *more])


def refused(ranks: Path, capsys, *more: str) -> str:
    """What is said when nothing is merged, and nothing left behind."""
    assert merge(ranks, *more) == 2
    assert not [path for path in ranks.parent.iterdir() if "out" in path.name]
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("form", ["huggingface", "mindspore"])
def test_every_byte_comes_back(tmp_path: Path, mesh: Mesh, form: str) -> None:
    save(tmp_path / "ranks", tensors(), mesh)
    assert merge(tmp_path / "ranks", "--format", form, "--max_shard_size", "300B") == 0
    assert same(content(tmp_path / "out"), tensors())
    listed = open_complete(tmp_path / "out").tensors
    assert set(listed) == set(tensors(optimizer=form == "mindspore"))
    index = "param_name_map.json" if form == "mindspore" else "model.safetensors.index.json"
    assert len(set(json.loads((tmp_path / "out" / index).read_text())["weight_map"].values())) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_cast_as_torch_casts_them(tmp_path: Path, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-40, 1.00390625, 65520.0])
    model = {**tensors(), "special": special, "ints": torch.arange(3, dtype=torch.int32)}
    save(tmp_path / "ranks", model, Mesh(tp=2))
    (tmp_path / "ranks/model/CKP").mkdir(parents=True)
    config = {"model_type": "llama", "torch_dtype": "float32"}
    (tmp_path / "ranks/model/CKP/config.json").write_text(json.dumps(config))
    name = str(dtype).removeprefix("torch.")
    assert merge(tmp_path / "ranks", "--dtype", name) == 0
    expected = {
        key: tensor if key.startswith("adam_") or not tensor.is_floating_point() else
        tensor.to(dtype)
        for key, tensor in model.items()
    }  # fmt: skip
    assert same(content(tmp_path / "out"), expected)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {"model_type": "llama", "dtype": name}


def test_the_python_call_takes_the_same_arguments(ranks: Path) -> None:
    exported = launcher.weights.unified_safetensors(
        mindspore_ckpt_dir=str(ranks), output_dir=str(ranks.parent / "out"), file_suffix="1_1",
        has_redundancy=True, filter_out_param_prefix="adam_", max_process_num=64,
        max_shard_size="1GiB",
    )  # fmt: skip
    assert exported.files == ("model-00001-of-00001.safetensors",)
    assert same(content(ranks.parent / "out"), tensors(optimizer=False))


def test_the_suffix_is_exact_and_runs_are_told_apart(ranks: Path, capsys) -> None:
    mesh = MESHES["all axes"]
    save(ranks, tensors(1), mesh, "CKP_rank_{}-11_1")
    save(ranks, tensors(2), mesh, "CKP_rank_{}_2-1_1")
    error = refused(ranks, capsys)
    assert "rank_0 has two files of the save 1_1: CKP_rank_0-1_1.safetensors, CKP_rank_0_2" in error
    assert merge(ranks, "--file_suffix", "2-1_1") == 0
    assert same(content(ranks.parent / "out"), tensors(2))
    assert merge(ranks, "--file_suffix", "11_1", "--overwrite") == 0
    assert same(content(ranks.parent / "out"), tensors(1))


def test_a_folder_is_replaced_on_request_only(ranks: Path, capsys) -> None:
    out = ranks.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert merge(ranks) == 2
    assert "out is not empty: existing files are not replaced by default" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert merge(ranks, "--overwrite") == 2
    assert "mine.txt" in capsys.readouterr().err
    (out / "mine.txt").rename(out / "model.safetensors")
    assert merge(ranks, "--overwrite") == 0
    assert not (out / "model.safetensors").exists()


def test_what_another_process_writes_is_left_to_it(ranks: Path, capsys) -> None:
    scratch = ranks.parent / ".out.tmp"
    scratch.mkdir()
    (scratch / "theirs").touch()
    descriptor = os.open(scratch, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert merge(ranks) == 2
    assert "is being written by another process" in capsys.readouterr().err
    assert (scratch / "theirs").exists()
    os.close(descriptor)
    assert merge(ranks) == 0
    assert not scratch.exists()


def test_the_files_say_whether_copies_were_left_out(tmp_path: Path, ranks: Path, capsys) -> None:
    assert merge(ranks, "--has_redundancy", "False") == 0
    said = capsys.readouterr().out
    assert "has_redundancy = False: no effect, the files have remove_redundancy = False" in said
    bare = tmp_path / "bare"
    replica_ranks = {name: index % 2 for index, name in enumerate(tensors())}
    save(bare, tensors(), Mesh(dp_replicate=2), replica_ranks=replica_ranks)
    assert merge(bare, "--has_redundancy", "true", "--overwrite") == 0
    assert "the files have remove_redundancy = True" in capsys.readouterr().out
    assert same(content(tmp_path / "out"), tensors())
    assert merge(bare, "--has_redundancy", "False", "--overwrite") == 0
    assert "no effect" not in capsys.readouterr().out


def test_a_lost_rank_is_said_and_its_copies_are_read(ranks: Path, capsys) -> None:
    shutil.rmtree(ranks / "rank_1")
    assert merge(ranks) == 0
    assert "rank 1 has no valid file; its parts are read from the ranks" in capsys.readouterr().out
    assert same(content(ranks.parent / "out"), tensors())
    shutil.rmtree(ranks.parent / "out")
    shutil.rmtree(ranks / "rank_5")
    reason = f"ranks 1, 5 have no valid file in {ranks}, and no other rank holds their parts"
    assert reason in refused(ranks, capsys)


@pytest.mark.parametrize("step", range(1, 12))
def test_a_changed_byte_is_found_while_it_is_read(tmp_path: Path, capsys, step: int) -> None:
    files = save(tmp_path / "ranks", tensors(), Mesh(tp=2))
    manifest(tmp_path / "ranks", files)
    flip(files[1], -step * 16)
    error = refused(tmp_path / "ranks", capsys)
    assert f"{files[1]}: bytes " in error
    assert "changed (" in error


def test_a_file_of_another_run_is_refused(tmp_path: Path, capsys) -> None:
    ranks, mesh = tmp_path / "ranks", Mesh(dp_shard=2)
    files = save(ranks, tensors(), mesh)
    others = save(tmp_path / "others", tensors(1), mesh)
    manifest(ranks, files)
    assert merge(ranks) == 0
    shutil.rmtree(tmp_path / "out")
    shutil.copy(others[1], files[1])
    error = refused(ranks, capsys)
    assert f"{files[1]} is not the file that was published with the save CKP-1_1" in error
    shutil.rmtree(ranks / "manifest")
    assert "these files are of two runs or steps" in refused(ranks, capsys)
    files[1].rename(files[1].with_name("CKP_rank_1_1-1_1.safetensors"))
    assert "mixes two saves: CKP_rank_0-1_1.safetensors and CKP_rank_1_1" in refused(ranks, capsys)


WRONG = {
    ("--file_sufix", "1_1"): "--file_sufix: no such option. did you mean `--file_suffix`?",
    ("--file_suffix", "9_9"): "no file of the save 9_9. There are: 1_1. Choose with --file_suffix",
    ("--file_suffix", "*"): "no file of the save *.",
    ("--has_redundancy", "maybe"): "'maybe' is neither True nor False",
    ("--max_process_num", "0"): "'0' is not an integer of at least 1",
    ("--max_shard_size", "5 apples"): "a size is a number and a unit",
    ("--format", "onnx"): "invalid choice: 'onnx'",
    ("--filter_out_param_prefix", ""): "",
    ("stray",): "stray: no such argument",
}


@pytest.mark.parametrize(("words", "said"), WRONG.items(), ids=[" ".join(w) for w in WRONG])
def test_mistakes_have_a_way_out(ranks: Path, capsys, words: tuple[str, ...], said: str) -> None:
    if said:
        assert said in refused(ranks, capsys, *words)
    else:
        assert merge(ranks, *words) == 0


def test_nothing_left_to_write(ranks: Path, capsys) -> None:
    save(ranks, {"adam_m.w": tensors()["embed"]}, Mesh(), "net_rank_{}-2_2")
    shutil.rmtree(ranks / "rank_1")
    said = refused(ranks, capsys, "--file_suffix", "2_2", "--filter_out_param_prefix", "adam_")
    assert "every tensor was filtered out" in said


def test_strategy_files_are_not_needed_for_ours(ranks: Path, capsys) -> None:
    (ranks.parent / "strategy").mkdir()
    strategy = str(ranks.parent / "strategy")
    assert merge(ranks, "--src_strategy_dirs", strategy) == 0
    assert (
        f"{strategy}: not needed, the rank files describe their layout" in capsys.readouterr().out
    )
    assert merge(ranks, "--overwrite", "--src_strategy_dirs", f"{strategy}s") == 2
    said = capsys.readouterr().err
    assert f"{strategy}s: there is no such path" in said
    assert f"did you mean `{strategy}`?" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("700", 700), (7, 7), ("2mb", 2 * 10**6)],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert size_in_bytes(text) == expected


@pytest.mark.parametrize("text", ["0", "-1GB", "5GX", "", "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="a size is a number and a unit"):
        size_in_bytes(text)


@needs_all
@pytest.mark.parametrize("tree", ["dp2mp2pp2", "dp2mp2pp2_dedup", "moe_dp4mp2_opt"])
def test_rank_files_of_mindspore_merge_as_mindspore_merges_them(tree: str, tmp_path: Path) -> None:
    from launcher.tools.diff import main as diff

    theirs, ranks = ALL / "dist" / "unified" / tree, ALL / "dist" / "ranks" / tree
    suffix = next(ranks.rglob("*.safetensors")).stem.rpartition("-")[2]
    strategies = ALL / "strategies" / tree.removesuffix("_dedup")
    out = tmp_path / "out"
    arguments = ["--mindspore_ckpt_dir", str(ranks), "--file_suffix", suffix, "--output_dir",
                 str(out), "--src_strategy_dirs", str(strategies)]  # fmt: skip
    assert main([*arguments, "--format", "mindspore"]) == 0
    assert diff([str(out), str(theirs), "--filter_out_param_prefix", "accu_grads"]) == 0
    extras = content(tmp_path / "out").keys() - open_complete(out).tensors.keys()
    assert {"epoch_num", "step_num"} <= extras
    assert "epoch_num" not in (out / "param_name_map.json").read_text()
