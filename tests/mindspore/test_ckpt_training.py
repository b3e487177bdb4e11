"""Runs that save MindSpore's `.ckpt` files, resume from them, and turn them into safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.catalog import published
from launcher.weights import safetensors_to_ckpt, unified_safetensors
from launcher.weights.formats import header_of
from launcher.weights.offline.inspection import verify
from launcher.weights.offline.listing import list_checkpoints
from launcher.weights.ranks.saves import open_any_format
from tests.ranks import JobResult, run_job
from tests.weights.content import content
from tests.workshop import Workshop

TWO = {"parallel_config": {"data_parallel": 1, "model_parallel": 2}}


def train(
    workshop: Workshop, output: str, monitor: dict[str, Any], world: int, *flags: str,
    **changes: Any,
) -> JobResult:  # fmt: skip
    callbacks = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2, **monitor}]
    name = workshop.yaml(
        f"{output}.yaml", callbacks=callbacks, output_dir=output,
        runner_config={"max_steps": 6}, **changes,
    )  # fmt: skip
    return run_job(["--config", name, "--run_mode", "train", *flags], workshop.folder, world)


def only(folder: Path) -> Path:
    """The file of weights in a folder."""
    (file,) = folder.glob("model*.safetensors")
    return file


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, materials: Workshop) -> Workshop:
    """Two ranks have trained six steps, once with each format."""
    shop = materials.copy_to(tmp_path_factory.mktemp("ckpt"))
    for output in ("safetensors", "ckpt"):
        how = {"checkpoint_format": output, "async_save": True, "keep_checkpoint_max": 2}
        result = train(shop, output, how, 2, **TWO)
        assert result.code == 0, result.stderr
    return shop


def test_a_save_holds_the_same_in_either_format(shop: Workshop) -> None:
    ours, theirs = (shop.folder / name / "checkpoint" for name in ("ckpt", "safetensors"))
    assert sorted(path.name for path in ours.glob("rank_*/CKP*")) == [
        f"CKP_rank_{rank}-1_{step}.ckpt" for rank in (0, 1) for step in (4, 6)
    ]
    assert content(open_any_format(ours, "1_6")) == content(open_any_format(theirs, "1_6"))
    verdict = verify(ours)
    assert (verdict.faults, verdict.unchecked, verdict.files) == ((), 0, 4)
    assert {row.state for row in list_checkpoints(ours)} == {"complete"}
    unified_safetensors(ours, shop.folder / "merged", file_suffix="1_6")
    merged = content(open_any_format(shop.folder / "merged"))
    assert merged == content(open_any_format(theirs, "1_6"))


def test_a_run_resumes_from_ckpt_files_bitwise(shop: Workshop) -> None:
    """Also under another layout, and with the other format from then on."""
    root = shop.folder / "ckpt/checkpoint"
    how = {"checkpoint_format": "ckpt"}
    flags = ("--load_checkpoint", str(root), "--resume_training", "CKP_rank_0-1_4.ckpt")
    result = train(shop, "resumed", how, 2, *flags, load_ckpt_format="ckpt", **TWO)
    assert result.code == 0, result.stderr
    again, first = (
        content(open_any_format(folder / "checkpoint", "1_6"))
        for folder in (shop.folder / "resumed", shop.folder / "ckpt")
    )
    assert again == first
    result = train(shop, "alone", {"checkpoint_format": "safetensors"}, 1, *flags)
    assert result.code == 0, result.stderr
    assert shop.losses("alone") == pytest.approx(shop.losses("ckpt")[4:], rel=1e-4)


def test_a_folder_may_have_saves_of_both_formats(shop: Workshop) -> None:
    shutil.copytree(shop.folder / "ckpt", shop.folder / "mixed")
    for steps in (8, 10):
        result = train(
            shop, "mixed", {"checkpoint_format": "safetensors"}, 2, "--resume_training", "True",
            f"runner_config.max_steps={steps}", **TWO,
        )  # fmt: skip
        assert result.code == 0, result.stderr
    root = shop.folder / "mixed/checkpoint"
    assert [(save.name.step, save.name.format) for save in published(root)] == [
        (4, "ckpt"), (6, "ckpt"), (8, "safetensors"), (10, "safetensors"),
    ]  # fmt: skip
    assert verify(root).faults == ()


def test_the_page_converts_by_a_training_task(shop: Workshop) -> None:
    """Rank files, and complete weights, which save_converted_checkpoint copies too."""
    root = str(shop.folder / "ckpt/checkpoint")
    asserted = {"load_ckpt_format": "ckpt", **TWO}
    how = {"checkpoint_format": "safetensors"}
    result = train(shop, "converted", how, 2, load_checkpoint=root, **asserted)
    assert result.code == 0, result.stderr
    assert len([*shop.folder.glob("converted/checkpoint/rank_*/*.safetensors")]) == 6
    merged = shop.folder / "complete.safetensors"
    unified_safetensors(root, shop.folder / "whole", file_suffix="1_6")
    shutil.copy(only(shop.folder / "whole"), merged)
    (made,) = safetensors_to_ckpt(merged, shop.folder / "whole_ckpt", crc_check=True).files
    asserted |= {"load_checkpoint": str(made), "save_converted_checkpoint": True}
    result = train(shop, "copied", how, 2, **asserted)
    assert result.code == 0, result.stderr
    assert "ms_safetensors" in result.stdout
    copy = open_any_format(shop.folder / "copied/ms_safetensors")
    assert content(copy) == content(open_any_format(merged))
    assert {h.metadata["format"] for h in copy.headers.values()} == {"ms"}


def test_a_damaged_file_is_not_loaded(shop: Workshop, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    unified_safetensors(shop.folder / "ckpt/checkpoint", folder / "in", file_suffix="1_6")
    (made,) = safetensors_to_ckpt(only(folder / "in"), folder / "out", crc_check=True).files
    raw = bytearray(made.read_bytes())
    raw[header_of(made).entries["model.norm.weight"].start] ^= 1
    made.write_bytes(raw)
    result = train(shop, "damaged", {}, 2, load_checkpoint=str(made), **TWO)
    assert result.code == 2
    assert f"{made} is damaged: the CRC-32 of its bytes" in result.stderr


def test_an_assertion_about_the_format_is_checked(shop: Workshop) -> None:
    root = str(shop.folder / "ckpt/checkpoint")
    wrong = {"load_checkpoint": root, "load_ckpt_format": "safetensors"}
    result = train(shop, "wrong", {}, 2, "--check_config", **wrong, **TWO)
    assert result.code == 2
    assert "contains .ckpt files of MindSpore. Nearest: ckpt." in result.stderr
