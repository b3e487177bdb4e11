"""Every fault is reported with file, tensor and rank; valid weights in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import launcher.weights
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.tools.verify import main
from tests.tools.checkpoints import flip, manifest, save, tensors


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Two published saves of two ranks."""
    root = tmp_path / "ranks"
    for seed, name in ((0, "CKP_rank_{}-1_1"), (1, "CKP_rank_{}-1_2")):
        files = save(root, tensors(seed), Mesh(dp_shard=2), name)
        manifest(root, files, f"CKP-{name[-3:]}")
    return root


def test_whole_saves_in_one_line(ranks: Path, capsys) -> None:
    assert main([str(ranks)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{ranks}: complete: 4 files, ")
    assert out.endswith(" MB, checksums match\n")
    verdict = launcher.weights.verify(ranks / "rank_1" / "CKP_rank_1-1_2.safetensors")
    assert (verdict.is_complete, verdict.files, verdict.unchecked) == (True, 1, 0)
    assert launcher.weights.verify(str(ranks / "rank_0")).files == 2


def file(ranks: Path, rank: int, step: int = 1) -> Path:
    return ranks / f"rank_{rank}" / f"CKP_rank_{rank}-1_{step}.safetensors"


def cut_short(ranks: Path) -> None:
    data = file(ranks, 0).read_bytes()
    file(ranks, 0).write_bytes(data[:-3])


def cut_short_without_manifest(ranks: Path) -> None:
    shutil.rmtree(ranks / "manifest")
    cut_short(ranks)


def without_rank(ranks: Path) -> None:
    shutil.rmtree(ranks / "manifest")
    file(ranks, 1).unlink()


def other_layout(ranks: Path) -> None:
    shutil.rmtree(ranks / "manifest")
    save(ranks.parent / "other", tensors(), Mesh(dp_replicate=2))
    shutil.copy(file(ranks.parent / "other", 1), file(ranks, 1))


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "two bits": (
        lambda ranks: (flip(file(ranks, 0)), flip(file(ranks, 1, 2))),
        [r"rank 0: .*rank_0/CKP_rank_0-1_1.safetensors: bytes \d+ to \d+ changed \(.*proj",
         r"rank 1: .*rank_1/CKP_rank_1-1_2.safetensors: bytes \d+ to \d+ changed"],
    ),
    "header": (lambda ranks: flip(file(ranks, 1), 30), [r"rank 1: .*rank_1/CKP_rank_1-1_1"]),
    "missing": (lambda ranks: file(ranks, 1).unlink(), [r"rank 1: .*1-1_1.safetensors is missing"]),
    "short": (cut_short, [r"rank 0: .*0-1_1.safetensors has \d+ bytes instead of \d+"]),
    "short, no manifest": (cut_short_without_manifest,
                           [r"rank 0: .*0-1_1.safetensors is not a valid safetensors file"]),
    "lost": (without_rank,
             [r"save CKP-1_1: .* does not hold all of `adam_m.embed`.*no valid file"]),
    "other layout": (other_layout, [r"save CKP-1_1: .* mixes two saves: CKP_rank_0-1_1.safeten"]),
    "manifest": (lambda ranks: (ranks / "manifest" / "CKP-1_2.json").write_text("{"),
                 [r"manifest/CKP-1_2.json cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_every_fault_is_named(case: str, ranks: Path, capsys) -> None:
    damage, expected = FAULTS[case]
    damage(ranks)
    assert main([str(ranks)]) == 1
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert line.startswith("fault: ")
        assert re.search(pattern, line)


def test_an_unfinished_save_is_no_fault(ranks: Path, capsys) -> None:
    (ranks / "manifest" / "CKP-1_2.json").rename(ranks / "manifest" / ".CKP-1_2.json.tmp")
    cut = file(ranks, 0, 2)
    cut.write_bytes(cut.read_bytes()[:100])
    assert main([str(ranks)]) == 0
    assert "the save CKP-1_2 was never finished: not checked" in capsys.readouterr().out


def complete(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "m-1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "m-2.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_complete_weights_and_their_index(tmp_path: Path, capsys) -> None:
    folder = complete(tmp_path / "full")
    assert main([str(folder)]) == 0
    assert "headers are valid, there are no checksums" in capsys.readouterr().out
    save_file({"a": torch.ones(2), "stray": torch.ones(2)}, folder / "m-1.safetensors")
    assert main([str(folder)]) == 1
    assert "m-1.safetensors: `stray` is not in model.safet" in capsys.readouterr().err
    save_file({"c": torch.ones(2)}, folder / "m-1.safetensors")
    assert main([str(folder)]) == 1
    assert "m-1.safetensors lacks `a`" in capsys.readouterr().err
    (folder / "m-2.safetensors").unlink()
    assert main([str(folder)]) == 1
    assert "names 1 file that cannot be found: m-2.safetensors" in capsys.readouterr().err


def test_no_weights_are_a_mistake(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no weights" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such path"):
        launcher.weights.verify(tmp_path / "nowhere")
