"""Files go from `.ckpt` to safetensors as MindSpore's own converters write them, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.mindspore import ckpt_writer
from launcher.weights import ckpt_to_safetensors, safetensors_to_ckpt
from launcher.weights.formats import header_of
from launcher.weights.offline.inspection import verify
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.source import open_complete
from tests.mindspore.ckpt import CHUNK, EXPECTED, GOLDEN, expected, value, whole
from tests.weights.content import content

CONVERTED = GOLDEN / "converted"


@pytest.mark.parametrize("name", ["chunked", "crc", "dtypes"])
def test_a_file_becomes_what_mindspore_makes_of_it(name: str, tmp_path: Path) -> None:
    (made,) = ckpt_to_safetensors(GOLDEN / f"{name}.ckpt", tmp_path).files
    theirs = CONVERTED / "ckpt_to_safetensors" / made.name
    assert whole(made) == whole(theirs) == expected(name)
    assert header_of(made).metadata == header_of(theirs).metadata == {"format": "ms"}


def test_names_are_mapped_as_mindspore_maps_them(tmp_path: Path) -> None:
    (made,) = ckpt_to_safetensors(GOLDEN / "crc.ckpt", tmp_path, {"w": "new.w"}).files
    assert whole(made) == whole(CONVERTED / "renamed/crc.safetensors")


def test_rank_folders_are_converted_by_a_pattern(tmp_path: Path) -> None:
    ckpt_to_safetensors(CONVERTED / "tree_src", tmp_path / "out", file_name_regex="1_4")
    for theirs in (CONVERTED / "tree_out").glob("*/*"):
        assert whole(tmp_path / "out" / theirs.parent.name / theirs.name) == whole(theirs)
    assert len([*tmp_path.glob("out/*/*")]) == 2


@pytest.mark.parametrize("name", EXPECTED)
def test_there_and_back_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ckpt_writer, "CHUNK_BYTES", CHUNK)
    log: list[str] = []
    (made,) = ckpt_to_safetensors(GOLDEN / f"{name}.ckpt", tmp_path, log=log.append).files
    (back,) = safetensors_to_ckpt(made, tmp_path, crc_check=True).files
    assert whole(back) == whole(made) == expected(name)
    header = header_of(back)
    assert (header.metadata, header.crc) == ({"format": "ms.ckpt"}, "mindspore")
    assert list(header.entries) == sorted(header.entries)
    assert bool(header.chunks) == ("chunked" in name)
    assert (verify(back).faults, verify(back).unchecked) == ((), 0)
    assert [line.partition(": ")[2] for line in log] == (
        ["left out, texts and no tensors: note, empty_note"] if name == "append" else []
    )


def test_the_bytes_are_those_of_mindspore(tmp_path: Path) -> None:
    (made,) = safetensors_to_ckpt(
        CONVERTED / "ckpt_to_safetensors/dtypes.safetensors", tmp_path
    ).files
    theirs = CONVERTED / "safetensors_to_ckpt/dtypes.ckpt"
    assert made.read_bytes() == theirs.read_bytes()


def test_chunks_are_those_of_mindspore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt_writer, "CHUNK_BYTES", CHUNK)
    theirs = GOLDEN / "chunked_crc.ckpt"
    (flat,) = ckpt_to_safetensors(theirs, tmp_path).files
    (made,) = safetensors_to_ckpt(flat, tmp_path, crc_check=True).files
    assert made.stat().st_size == theirs.stat().st_size
    assert {n: len(c) for n, c in header_of(made).chunks.items()} == {
        n: len(c) for n, c in header_of(theirs).chunks.items()
    }


def test_a_damaged_file_is_not_converted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is damaged: the CRC-32"):
        ckpt_to_safetensors(GOLDEN / "crc_bad.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_without_elements_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").write_bytes(value("w", (2, 0), b"") + value("v", (1,), bytes(4)))
    ckpt_to_safetensors(tmp_path / "w.ckpt")
    log: list[str] = []
    safetensors_to_ckpt(tmp_path / "w.safetensors", tmp_path / "back", log=log.append)
    assert [line.partition(": ")[2] for line in log] == ["left out, no elements: w"]
    assert list(whole(tmp_path / "back")) == ["v"]


def test_mistakes(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "crc.ckpt", tmp_path)
    ckpt_to_safetensors(tmp_path / "crc.ckpt")
    with pytest.raises(UserError, match=r"crc\.ckpt is a ckpt file already"):
        safetensors_to_ckpt(tmp_path / "crc.ckpt", tmp_path / "out")
    with pytest.raises(UserError, match=r"crc\.safetensors is a safetensors file already"):
        ckpt_to_safetensors(tmp_path / "crc.safetensors", tmp_path / "out")
    _write_float8(tmp_path / "eight.safetensors")
    with pytest.raises(UserError, match=r"cannot hold `w`, which is F8_E4M3: .* files have BF16"):
        safetensors_to_ckpt(tmp_path / "eight.safetensors", tmp_path / "out")


def _write_float8(path: Path) -> None:
    raw = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"ab")


def _rank_folder(root: Path, file_format: str) -> Path:
    """Two ranks of a run of Slipway, each with one row."""
    for rank in range(2):
        file = root / f"rank_{rank}/CKP_rank_{rank}-1_1.{file_format}"
        file.parent.mkdir(parents=True)
        rows = torch.arange(6.0).reshape(2, 3)
        box = full_box((1, 3))._replace(offset=(rank, 0))
        shards = {"w": Shard((2, 3), box, rows[rank : rank + 1].to(torch.bfloat16)),
                  "n": Shard((), full_box(()), torch.tensor(7))}  # fmt: skip
        write_rank_file(file, shards, mesh=Mesh(tp=2), rank=rank, file_format=file_format)
    return root


@pytest.mark.parametrize("file_format", ["safetensors", "ckpt"])
def test_rank_files_of_slipway_keep_their_layout(file_format: str, tmp_path: Path) -> None:
    origin = _rank_folder(tmp_path / "in", file_format)
    back = safetensors_to_ckpt if file_format == "safetensors" else ckpt_to_safetensors
    back(origin, tmp_path / "out")
    sources = [open_any_format(folder) for folder in (origin, tmp_path / "out")]
    assert content(sources[0]) == content(sources[1])
    assert sources[0].mesh == sources[1].mesh
    verdict = verify(tmp_path / "out")
    assert (verdict.faults, verdict.unchecked, verdict.files) == ((), 0, 2)


def test_a_changed_byte_of_a_rank_file_is_found(tmp_path: Path) -> None:
    origin = _rank_folder(tmp_path, "ckpt")
    file = origin / "rank_1/CKP_rank_1-1_1.ckpt"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert [f"{file}: bytes 4096 to " in fault for fault in verify(origin).faults] == [True]
    assert open_complete(file).tensors.keys() == {"w", "n"}
