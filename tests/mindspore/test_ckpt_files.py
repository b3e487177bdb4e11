"""Files in MindSpore's `.ckpt` format are read bit for bit; damaged files are refused."""

from __future__ import annotations

import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.layout.shard import Shard
from launcher.mindspore import ckpt_values
from launcher.mindspore.ckpt_values import boxes_between
from launcher.mindspore.ckpt_writer import value_start
from launcher.mindspore.file_bytes import WINDOW
from launcher.mindspore.protobuf_wire import nested, varint
from launcher.weights.formats import header_of
from launcher.weights.offline.inspection import verify
from launcher.weights.offline.merge import unified_safetensors
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.reading.checksums import check_file
from launcher.weights.reading.load import load
from launcher.weights.source import open_complete
from tests.mindspore.ckpt import (
    EXPECTED,
    GOLDEN,
    RANKS,
    STRATEGY,
    expected,
    expected_texts,
    raw_value,
    value,
    whole,
)
from tests.mindspore.golden import ALL, needs_all
from tests.weights.content import content

F4 = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_mindspore_holds_what_it_put_there(name: str) -> None:
    assert whole(GOLDEN / f"{name}.ckpt") == expected(name)


@pytest.mark.parametrize("name", ["zero_dim", "zero_len"])
def test_an_empty_tensor_is_not_in_the_file(name: str) -> None:
    assert list(whole(GOLDEN / f"{name}.ckpt")) == ["w"]


def test_texts_are_kept_apart_and_said() -> None:
    assert header_of(GOLDEN / "append.ckpt").texts == expected_texts()
    (remark,) = open_complete(GOLDEN / "append.ckpt").remarks
    assert remark.endswith("append.ckpt: left out, texts and no tensors: note, empty_note")


@pytest.mark.parametrize("name", ["chunked", "chunked_async"])
def test_any_box_of_a_tensor_in_chunks_is_loaded(name: str) -> None:
    source = open_complete(GOLDEN / f"{name}.ckpt")
    whole_rows = torch.frombuffer(bytearray(expected(name)["rows"][2]), dtype=torch.float32)
    whole_rows = whole_rows.reshape(7, 100)
    box = Box((1, 30), (5, 41))
    target = torch.empty(box.size, dtype=torch.float64)
    load({"rows": Shard((7, 100), box, target)}, source, strict=False)
    assert torch.equal(target, whole_rows[1:6, 30:71].double())


def test_an_older_scalar_has_one_dim_of_zero(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(
        raw_value(b"scalar", (0,), b"Float32", F4[:4]) + raw_value(b"none", (0,), b"Int8", b"")
    )
    assert whole(path) == {"scalar": ("F32", (), F4[:4]), "none": ("I8", (0,), b"")}


def test_other_fields_and_packed_dims_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "later.ckpt"
    dims = nested(1, varint(2) + varint(2))
    tensor = nested(3, F4) + dims + nested(9, b"new") + nested(2, b"Float32")
    path.write_bytes(nested(1, nested(2, tensor) + nested(1, b"w")) + nested(7, b"new"))
    assert whole(path) == {"w": ("F32", (2, 2), F4)}


def test_memory_is_that_of_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, real = tmp_path / "large.ckpt", list[int](), os.pread

    def counted(descriptor: int, nbytes: int, position: int) -> bytes:
        read.append(nbytes)
        return real(descriptor, nbytes, position)

    with path.open("wb") as file:
        for name in "ab":
            file.write(value_start(name, "F32", (1 << 28,), 1 << 30))
            file.truncate(file.seek(1 << 30, os.SEEK_CUR))
    monkeypatch.setattr(os, "pread", counted)
    header = header_of(path)
    assert [entry.shape for entry in header.entries.values()] == [(1 << 28,)] * 2
    assert sum(read) <= 4 * WINDOW


BROKEN: dict[str, tuple[bytes, str]] = {
    "cut off": (value("w", (2, 2), F4)[:-1], "byte 0: field 1 claims 36 bytes, 35 are left"),
    "second": (value("w", (4,), F4) + value("v", (4,), F4) + value("w", (4,), F4),
               "byte 72: a second `w`, not next to the first"),
    "too many bytes": (value("w", (4,), F4) * 2, "`w`, Float32 [4], does not fill its 32 bytes"),
    "too few bytes": (value("w", (5,), F4), "`w`, Float32 [5], does not fill its 16 bytes"),
    "too few bytes in chunks": (value("w", (9,), F4) * 2, "does not fill its 32 bytes"),
    "other dims": (value("w", (8,), F4) + value("w", (9,), F4), "is Float32 [9], the first is"),
    "other dtype": (value("w", (8,), F4) + value("w", (8,), F4, "I32"), "is Int32 [8], the first"),
    "inside an element": (value("w", (8,), F4 + b"1") + value("w", (8,), F4[:-1]),
                          "a chunk of `w` ends inside an element: it has 17 bytes, Float32 has 4"),
    "huge dims": (raw_value(b"w", (1 << 62, 1 << 62), b"Float32", F4), "does not fill its 16"),
    "negative dims": (raw_value(b"w", (-1, -4), b"Float32", F4), "it has the shape [-1, -4]"),
    "many dims": (raw_value(b"w", (1,) * 65, b"Float32", F4), "it has more than 64 dims"),
    "many packed dims": (nested(1, nested(1, b"w") + nested(2, nested(1, b"\x01" * 999)
                         + nested(2, b"Float32") + nested(3, F4))), "it has more than 64 dims"),
    "dtype": (raw_value(b"w", (4,), b"Float33", F4), "`w`: the unknown dtype 'Float33'"),
    "dtype is not text": (raw_value(b"w", (4,), b"\xff\xfe", F4), "(tensor_type) is not UTF-8"),
    "name is not text": (raw_value(b"\xff", (4,), b"Float32", F4), "name (tag) is not UTF-8"),
    "long name": (raw_value(b"n" * 99999, (4,), b"Float32", F4), "a name (tag) of 99999 bytes"),
    "no name": (nested(1, b""), "has no name (tag) (field 1)"),
    "no tensor": (nested(1, nested(1, b"w")), "`w`: the message from here on has no tensor"),
    "no content": (nested(1, nested(1, b"w") + nested(2, nested(2, b"Bool"))), "has no content"),
    "two names": (nested(1, nested(1, b"w") * 2), "a second name (tag)"),
    "a group": (b"\x0a\x01\x0b" + bytes(20), "3 is not a wire type in use"),
    "text is not text": (raw_value(b"t", (0,), b"str", b"\xff" * 4), "`t`: it is not UTF-32"),
    "large text": (raw_value(b"t", (0,), b"str", bytes(1 << 21)), "a text of 2097152 bytes"),
    "two texts": (raw_value(b"t", (0,), b"str", b"a\0\0\0") * 2, "a second `t`"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_valid_is_refused(case: str, tmp_path: Path) -> None:
    raw, said = BROKEN[case]
    path = tmp_path / "w.ckpt"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        header_of(path)
    (problem,) = caught.value.problems
    assert problem.what == f"{path} is not a valid .ckpt file of MindSpore"
    assert problem.rule.startswith("byte ")


NOT_READ = {
    "Int4": (raw_value(b"w", (4,), b"Int4", b"ab"), "`w` at byte .* has the dtype Int4"),
    "map": (nested(1, nested(1, b"w") + nested(3, b"")), "`w` at byte 0 is a hash map"),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_has_no_counterpart_is_refused(case: str, tmp_path: Path) -> None:
    raw, said = NOT_READ[case]
    (tmp_path / "w.ckpt").write_bytes(raw)
    with pytest.raises(UserError, match=f"w.ckpt: {said}"):
        open_complete(tmp_path)


@pytest.mark.parametrize("name", ["enc_aes-cbc", "enc_aes-gcm", "enc_sm4-cbc"])
def test_an_encrypted_file_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is an encrypted file of MindSpore"):
        open_complete(GOLDEN / f"{name}.ckpt")


def test_a_file_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"nothing\.ckpt is empty: it has 0 bytes"):
        open_complete(GOLDEN / "nothing.ckpt")


def test_a_file_cannot_have_millions_of_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.mindspore.ckpt_files.TENSOR_LIMIT", 3)
    (tmp_path / "w.ckpt").write_bytes(value("w", (4,), b"") * 4)
    with pytest.raises(UserError, match="there are more than 3 values"):
        header_of(tmp_path / "w.ckpt")
    assert ckpt_values.TENSOR_LIMIT == 1 << 20


def test_a_checksum_is_verified(tmp_path: Path) -> None:
    for name in ("crc", "chunked_crc", "crc_bad"):
        path = GOLDEN / f"{name}.ckpt"
        header, verdict = header_of(path), verify(path)
        assert (header.crc, verdict.unchecked) == ("mindspore", 0)
        assert verdict.is_complete == (name != "crc_bad")
    with pytest.raises(UserError, match=r"is damaged: the CRC-32 of its bytes 0 to 100 is \d+"):
        check_file(path, header)


def test_a_damaged_rank_file_is_not_merged(tmp_path: Path) -> None:
    (tmp_path / "in/rank_0").mkdir(parents=True)
    shutil.copy(GOLDEN / "crc_bad.ckpt", tmp_path / "in/rank_0/net_rank_0-1_1.ckpt")
    with pytest.raises(UserError, match="is damaged: the CRC-32"):
        unified_safetensors(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_files_are_one_model(tmp_path: Path) -> None:
    for name in ("crc", "dtypes"):
        shutil.copy(GOLDEN / f"{name}.ckpt", tmp_path)
    assert whole(tmp_path) == expected("crc") | expected("dtypes")


def test_rank_files_open_with_their_strategy() -> None:
    source = open_any_format(RANKS, strategy=STRATEGY)
    assert (source.kind, source.world_size) == ("distributed", 2)
    assert {"step_num", "epoch_num"} <= source.extras.keys()


def test_boxes_are_the_elements_in_order() -> None:
    for shape in [(), (7,), (1, 9), (3, 1, 4), (2, 3, 4), (2, 1, 3, 2)]:
        numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
        for first in range(numbers.numel()):
            for last in range(first, numbers.numel() + 1):
                boxes = boxes_between(shape, first, last)
                assert len(boxes) <= max(2 * len(shape), 1)
                found = [
                    numbers[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten()
                    for box in boxes
                ]
                assert torch.cat([*found, torch.empty(0)]).tolist() == [*range(first, last)]


TREES = {
    "ranks/mp2_ckpt": "mp2",
    "resliced/mp2_predict_ckpt": "mp2_predict",
    "transformed/mp2_ckpt_to_mp4": "mp4_predict",
}


@needs_all
@pytest.mark.parametrize("tree", TREES)
def test_every_tree_of_rank_files(tree: str) -> None:
    """Also those that MindSpore's own tools wrote."""
    full = content(open_complete(ALL / "dist/full/llama/model.safetensors"))
    source = open_any_format(ALL / "dist" / tree, strategy=ALL / "strategies" / TREES[tree])
    assert content(source).items() <= full.items()
    assert len(source.tensors) > 20
