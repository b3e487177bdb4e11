"""Which save of MindFormers a resume goes on from: what its meta.json say, and what is on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.checkpoint.resume import Chosen, choose
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.mindspore.strategy import strategy_file
from launcher.mindspore.tensor_layout import TensorLayout
from tests.checkpoint import crew
from tests.checkpoint.test_resolve import save

RANKS = 2
ROWS = TensorLayout((2,), ((0, -1),))


def written(root: Path, *saves: str, prefix: str = "mf", run: str = "") -> Path:
    """The folder `checkpoint` with these saves (`1_10`), and the strategy of its two ranks."""
    folder = root / "checkpoint"
    for rank in range(RANKS):
        (folder / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
        for name in saves:
            tensors = {"w": torch.full((2, 3), float(rank)), "step_num": torch.tensor(7)}
            path = folder / f"rank_{rank}" / f"{prefix}_rank_{rank}{run}-{name}.safetensors"
            save_file(tensors, path, {"format": "ms"})
        (root / "strategy").mkdir(exist_ok=True)
        content = strategy_file({"w": ROWS}, 0)
        (root / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(content)
    return folder


def meta(root: Path, *said: str | dict[str, Any] | None, prefix: str = "mf", run: str = "") -> None:
    """The meta.json of each rank: of a save (`1_10`), of this content, or none."""
    for rank, content in enumerate(said):
        if isinstance(content, str) and "_" in content:
            epoch, step = map(int, content.split("_"))
            file = f"{prefix}_rank_{rank}{run}-{content}.safetensors"
            content = {"last_epoch": epoch, "last_step": step, "last_ckpt_file": file}
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (root / f"rank_{rank}" / "meta.json").write_text(text)


def chosen(root: Path, choice: bool | str = True, size: int = 1) -> tuple[Chosen, list[str]]:
    """What a resume takes, on `size` ranks, and what the first of them says."""
    said: list[str] = []
    found = crew.together(
        size, lambda world: choose(root, choice, world, said.append if world.is_main else str)
    )
    assert found[0] is not None
    assert len({one.label for one in found}) == 1
    return found[0], said


FILE = "mf_rank_0-1_10.safetensors"
GARBAGE: dict[str, tuple[Any, str]] = {
    "missing": (None, "is missing"),
    "empty": ("", "cannot be read"),
    "no JSON": ("{", "cannot be read"),
    "a list": ("[1]", "cannot be read"),
    "no number": (
        {"last_epoch": "1", "last_step": 10, "last_ckpt_file": FILE},
        "has the epoch '1' and the step 10",
    ),
    "a truth": (
        {"last_epoch": True, "last_step": 10, "last_ckpt_file": FILE},
        "has the epoch True and the step 10",
    ),
    "no name": (
        {"last_epoch": 1, "last_step": 10},
        "names None, which is not a file of rank 0, epoch 1 and step 10",
    ),
    "another rank": (
        {"last_epoch": 1, "last_step": 10, "last_ckpt_file": FILE.replace("_0-", "_1-")},
        "names 'mf_rank_1-1_10.safetensors', which is not a file of rank 0",
    ),
    "other numbers": (
        {"last_epoch": 1, "last_step": 5, "last_ckpt_file": FILE},
        f"names '{FILE}', which is not a file of rank 0, epoch 1 and step 5",
    ),
}


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_meta_json_of_all_ranks(tmp_path: Path, size: int) -> None:
    root = written(tmp_path, "1_5", "1_10", "2_3")
    meta(root, "2_3", "1_10")
    found, said = chosen(root, size=size)
    assert (found.label, said) == ("mf-1_10", [])
    assert found.source.world_size == RANKS
    assert found.source.extras.keys() == {"step_num"}
    assert (found.state, found.is_newest) == ({}, False)


@pytest.mark.parametrize("case", GARBAGE)
def test_a_meta_json_that_cannot_be_used_is_passed_over(tmp_path: Path, case: str) -> None:
    content, fault = GARBAGE[case]
    root = written(tmp_path, "1_5", "1_10", "1_15")
    meta(root, content, "1_10")
    found, said = chosen(root)
    assert found.label == "mf-1_10"
    assert said[0].startswith(f"warning: {root}/rank_0/meta.json {fault}")
    assert said[0].endswith(": skipped")


def test_without_any_the_numbers_decide_and_not_the_time(tmp_path: Path) -> None:
    root = written(tmp_path, "1_9", "1_10")
    for file in root.glob("*/*-1_9.safetensors"):
        os.utime(file, (2e9, 2e9))
    meta(root, "{", None)
    found, said = chosen(root)
    assert found.label == "mf-1_10"
    assert said == [f"warning: no meta.json in {root} is valid: using epoch_step of the file names"]


def test_a_later_run_of_the_same_step_comes_first(tmp_path: Path) -> None:
    written(tmp_path, "1_5", "1_10", "1_15")
    written(tmp_path, "1_20", prefix="other")
    root = written(tmp_path, "1_10", run="_1")
    meta(root, "1_10", "1_10", run="_1")
    assert chosen(root)[0].label == "mf_1-1_10"
    (root / "rank_1/mf_rank_1_1-1_10.safetensors").unlink()
    assert chosen(root)[0].label == "mf-1_10"


@pytest.mark.parametrize("damage", ["gone", "cut", "of another save"])
def test_a_save_that_is_not_complete_is_passed_over(tmp_path: Path, damage: str) -> None:
    root = written(tmp_path, "1_5", "1_10")
    meta(root, "1_10", "1_10")
    file = root / "rank_1/mf_rank_1-1_10.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        save_file({"w": torch.ones(2, 3), "step_num": torch.tensor(8)}, file, {"format": "ms"})
    for size in (1, 2):
        found, said = chosen(root, size=size)
        assert found.label == "mf-1_5"
        assert said[0].startswith("skipped mf-1_10: ")
    expected = {
        "gone": "and no other rank holds its parts",
        "cut": f"{file} is not a valid safetensors file",
        "of another save": f"{file} has 8: the files of one save are of one step",
    }
    assert expected[damage] in said[0]


def test_copies_do_not_stand_in_for_a_rank(tmp_path: Path) -> None:
    """Of a published save they do; here nothing says that the files are of one run."""
    mesh = Mesh(dp_replicate=2)
    save(tmp_path, 5, mesh)
    files = save(tmp_path, 10, mesh)
    files[1].unlink()
    found, said = chosen(tmp_path)
    assert found.label == "CKP-1_5"
    assert said[1] == (
        f"skipped CKP-1_10: {tmp_path}: rank 1 has no valid file of it: 2 ranks wrote it."
    )


def test_when_no_save_is_complete_the_user_hears_why(tmp_path: Path) -> None:
    root = written(tmp_path, "1_5", "1_10")
    shutil.rmtree(root / "rank_1")
    with pytest.raises(UserError) as caught:
        chosen(root)
    first, second = map(str, caught.value.problems)
    assert first == (
        f"no checkpoint in {root} is complete: every rank must have a valid file of it; 2 were "
        "tried. Copy what is missing, or use run_mode finetune to start from "
        "weights alone."
    )
    assert "no other rank holds its parts" in second
    assert "The strategy files describe 2 ranks, 1 have a file" in second


def test_nothing_is_up_to_the_smallest_meta_json(tmp_path: Path) -> None:
    root = written(tmp_path, "1_10", "1_15")
    meta(root, "1_15", "1_5")
    with pytest.raises(UserError) as caught:
        chosen(root)
    assert str(caught.value) == (
        f"{root} holds no save of 'mf' up to epoch 1, step 5: the smallest meta.json of all ranks "
        "is the last save that every rank has. It holds mf-1_10, mf-1_15. Name one of them as "
        "resume_training."
    )


@pytest.mark.parametrize(
    "choice", ["mf_rank_0-1_5", "mf_rank_1-1_5.safetensors", "mf-1_5", "other_rank_0-1_5"]
)
def test_a_name_chooses_whatever_meta_json_says(tmp_path: Path, choice: str) -> None:
    root = written(tmp_path, "1_5", "1_10", "11_5")
    meta(root, "1_10", "1_10")
    if choice.startswith("other"):
        with pytest.raises(UserError, match=r"there is no such checkpoint in .*: it holds mf-1_5"):
            chosen(root, choice)
    else:
        assert chosen(root, choice)[0].label == "mf-1_5"


def test_a_file_stands_for_its_save(tmp_path: Path) -> None:
    root = written(tmp_path, "1_5", "1_10")
    assert chosen(root / "rank_1/mf_rank_1-1_5.safetensors")[0].label == "mf-1_5"


def test_without_strategy_files_the_user_hears_what_is_needed(tmp_path: Path) -> None:
    root = written(tmp_path, "1_5")
    shutil.move(tmp_path / "strategy", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="Set src_strategy_path_or_dir"):
        chosen(root)
    found = choose(root, True, crew.ALONE, print, str(tmp_path / "elsewhere"))
    assert found is not None
    assert found.label == "mf-1_5"


def test_files_in_mindspores_own_format_are_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "rank_0").mkdir()
    (tmp_path / "rank_0/mf_rank_0-1_5.ckpt").write_bytes(b"\x0a\x18\x0a\x01w" + bytes(20))
    with pytest.raises(UserError, match=r"is not a valid \.ckpt file of MindSpore: byte 0"):
        chosen(tmp_path)


def test_what_was_published_comes_first(tmp_path: Path) -> None:
    root = written(tmp_path, "9_9")
    meta(root, "9_9", "9_9")
    crew.save(root, 10, {"w": torch.ones(4, 3)}, Mesh(dp_replicate=2))
    assert (chosen(root)[0].label, chosen(root, "mf_rank_0-9_9")[0].label) == ("CKP-1_10", "mf-9_9")


def test_what_was_never_finished_is_none_of_them(tmp_path: Path) -> None:
    crew.save(tmp_path, 10, {"w": torch.ones(4)}, Mesh(dp_replicate=2))
    manifest = tmp_path / "manifest/CKP-1_10.json"
    manifest.rename(manifest.with_name(".CKP-1_10.json.tmp"))
    assert choose(tmp_path, True, crew.ALONE, print) is None


@pytest.mark.parametrize("has_state", [True, False])
def test_our_own_files_without_a_manifest(tmp_path: Path, has_state: bool) -> None:
    crew.save(tmp_path, 10, {"w": torch.ones(4)}, Mesh(dp_replicate=2))
    shutil.rmtree(tmp_path / "manifest")
    if not has_state:
        shutil.rmtree(tmp_path / "state")
    found, _ = chosen(tmp_path, size=2)
    assert (str(found.name), found.is_newest) == ("CKP-1_10", False)
    assert found.state == ({**crew.STATE, "global_step": 10} if has_state else {})


@pytest.mark.parametrize("mesh", [Mesh(dp_replicate=2), Mesh(dp_shard=2)])
def test_a_flipped_bit_in_files_of_ours_is_found_without_a_manifest(
    tmp_path: Path, mesh: Mesh
) -> None:
    files = save(tmp_path, 5, mesh) and save(tmp_path, 10, mesh)
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    found, said = chosen(tmp_path)
    assert found.label == "CKP-1_5"
    assert f"{files[1]}: bytes " in said[1]
