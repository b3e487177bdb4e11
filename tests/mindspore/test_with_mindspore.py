"""MindSpore itself reads what Slipway writes (`make test-mindspore`; skipped without MindSpore).

MindSpore has an environment of its own, `.venv-mindspore` or that of SLIPWAY_MINDSPORE (a path of
an interpreter): it needs numpy 1, for bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.mindspore import ckpt_writer
from launcher.mindspore.ckpt_values import DTYPES
from launcher.mindspore.mindrecord.reader import read_rows
from launcher.weights import ckpt_to_safetensors, safetensors_to_ckpt, unified_safetensors
from launcher.weights.ranks.saves import open_any_format
from tests.mindspore.ckpt import CHUNK, EXPECTED, GOLDEN, expected, whole
from tests.mindspore.records import plain
from tests.ranks import run_job
from tests.weights.content import Content, content
from tests.workshop import Workshop

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SLIPWAY_MINDSPORE", ROOT / ".venv-mindspore/bin/python"))
SCRIPT = Path(__file__).with_name("in_mindspore.py")

pytestmark = [
    pytest.mark.mindspore,
    pytest.mark.skipif(not PYTHON.exists(), reason="MindSpore is not installed"),
]


def mindspore(*words: str | Path) -> Any:
    """What the script prints last."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [PYTHON, SCRIPT, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded(path: Path, file_format: str = "ckpt") -> Content:
    """What MindSpore loads from a file."""
    found = mindspore("load", path, file_format)
    return {name: (DTYPES[dtype], tuple(shape), bytes.fromhex(raw))
            for name, (dtype, shape, raw) in found.items()}  # fmt: skip


@pytest.mark.parametrize("crc_check", [False, True])
def test_every_dtype_and_chunks_of_a_file(
    crc_check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ckpt_writer, "CHUNK_BYTES", CHUNK)
    for name in {"dtypes", "chunked"} & EXPECTED.keys():
        (flat,) = ckpt_to_safetensors(GOLDEN / f"{name}.ckpt", tmp_path).files
        (made,) = safetensors_to_ckpt(flat, tmp_path, crc_check=crc_check).files
        assert loaded(made) == expected(name) == loaded(flat, "safetensors")


def test_complete_weights_in_mindspores_form(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.w": torch.randn(6, 5).to(torch.bfloat16) for n in range(3)}
    (tmp_path / "in/rank_0").mkdir(parents=True)
    save_file(tensors, tmp_path / "in/rank_0/net_rank_0-1_1.safetensors", {"format": "ms"})
    unified_safetensors(tmp_path / "in", tmp_path / "out", format="mindspore")
    names = json.loads((tmp_path / "out/param_name_map.json").read_text())["weight_map"]
    found = Content()
    for file in sorted(set(names.values())):
        found |= loaded(tmp_path / "out" / file, "safetensors")
    assert found == whole(tmp_path / "out")
    assert found.keys() == tensors.keys() == names.keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, materials: Workshop) -> Path:
    """Four ranks, two of them in each of two stages, have trained with each format."""
    shop = materials.copy_to(tmp_path_factory.mktemp("trained"))
    for file_format in ("safetensors", "ckpt"):
        name = shop.yaml(
            output_dir=file_format,
            callbacks=[{"type": "CheckpointMonitor", "checkpoint_format": file_format}],
            runner_config={"max_steps": 1, "batch_size": 2},
            parallel_config={"data_parallel": 1, "model_parallel": 2, "pipeline_stage": 2,
                             "micro_batch_num": 2},
            model={"model_config": {"tie_word_embeddings": False}},
        )  # fmt: skip
        result = run_job(["--config", name, "--run_mode", "train"], shop.folder, 4)
        assert result.code == 0, result.stderr
    return shop.folder


def test_rank_files_are_merged_by_strategy_files(trained: Path, tmp_path: Path) -> None:
    ours = trained / "safetensors"
    mindspore("merge", ours / "checkpoint", ours / "strategy", tmp_path)
    theirs = whole(tmp_path / "complete")
    assert theirs == content(open_any_format(ours / "checkpoint"))


def test_rank_files_of_its_own_format(trained: Path, tmp_path: Path) -> None:
    """Also after MindSpore's own converter, by which it merges them."""
    root = trained / "ckpt/checkpoint"
    files = sorted(root.glob("rank_*/*.ckpt"))
    assert len(files) == 4
    assert loaded(files[0]) == whole(files[0])
    for file in files:
        mindspore("convert", file, tmp_path / "in" / file.parent.name)
    mindspore("merge", tmp_path / "in", trained / "ckpt/strategy", tmp_path)
    assert whole(tmp_path / "complete") == content(open_any_format(root))
    shutil.rmtree(tmp_path)


def test_mindrecord_files_are_read_as_minddataset_reads_them(tmp_path: Path) -> None:
    mindspore("records", tmp_path)
    rows = 0
    for file in sorted(tmp_path.glob("*.json")):
        known = json.loads(file.read_text())
        reader = read_rows(known["first"])
        found = [{key: plain(value) for key, value in row.items()} for row in reader.records()]
        for one, other in zip(found, known["rows"], strict=True):
            if file.stem == "scalars":  # all are index fields, whose doubles have 15 digits there
                assert one.pop("d") == pytest.approx(other.pop("d"), rel=1e-14)
            assert one == other
        rows += len(found)
    assert rows == 9000
