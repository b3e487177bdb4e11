"""Our reader and writer against the safetensors library, and against headers that lie."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.formats.rank_metadata import BLOCK_BYTES, read_rank_metadata
from launcher.weights.formats.safetensors import read_header
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.checksums import file_faults


def shard_of(tensor: torch.Tensor) -> Shard:
    return Shard(tuple(tensor.shape), full_box(tensor.shape), tensor)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, generator=generator).bfloat16(),
        "matrix": torch.randn(5, 7, generator=generator),
        "scalar": torch.tensor(3.5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    }


def test_the_library_reads_what_we_write(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    write_rank_file(path, {n: shard_of(t) for n, t in tensors().items()}, mesh=Mesh(), rank=0)
    back = load_file(path)
    assert back.keys() == tensors().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors().items())


def test_we_read_the_header_the_library_writes(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {n: e.shape for n, e in header.entries.items()} == {
        n: tuple(t.shape) for n, t in tensors().items()
    }
    assert read_rank_metadata(path, header) is None


def test_equal_state_gives_equal_bytes(tmp_path) -> None:
    content = {n: shard_of(t) for n, t in tensors().items()}
    for name, order in (("a", list(content)), ("b", list(reversed(content)))):
        write_rank_file(tmp_path / name, {n: content[n] for n in order}, mesh=Mesh(), rank=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_header_describes_layout_and_checksums(tmp_path) -> None:
    shard = Shard((10, 3), full_box((4, 3)), torch.zeros(4, 3))
    header = write_rank_file(tmp_path / "a", {"w": shard}, mesh=Mesh(dp_shard=2), rank=1)
    assert header.metadata["format"] == "pt"
    assert header.metadata["remove_redundancy"] == "False"
    note = json.loads(header.metadata["slipway"])
    assert (note["world_size"], note["rank"], note["mesh"]["dp_shard"]) == (2, 1, 2)
    assert note["tensors"] == {"w": {"shape": [10, 3], "boxes": [[[0, 0], [4, 3]]]}}
    assert note["checksum"]["algorithm"] == "xxh3_64"
    assert note["checksum"]["values"] == [xxhash.xxh3_64_hexdigest(bytes(48))]


@pytest.mark.parametrize("place", [0, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 17])
def test_one_flipped_bit_anywhere_in_the_data_is_found_and_named(tmp_path, place: int) -> None:
    path = tmp_path / "a.safetensors"
    shard = shard_of(torch.zeros(BLOCK_BYTES * 5 // 8, 1))
    header = write_rank_file(path, {"weight": shard}, mesh=Mesh(), rank=0)
    assert file_faults(path) == []
    content = bytearray(path.read_bytes())
    content[header.data_start + place] ^= 4
    path.write_bytes(content)
    (fault,) = file_faults(path)
    assert str(path) in fault
    assert "weight" in fault


def header_bytes(content: object, data: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


LIES = {
    "empty file": (b"", "has 0 bytes"),
    "cut length": (b"\x01\x02", "has 2 bytes"),
    "huge header": (struct.pack("<Q", 1 << 60) + b"{}", "its header claims"),
    "header past the end": (struct.pack("<Q", 50) + b"{}", "its header claims 50"),
    "no JSON": (header_bytes(b"not json"), "its header is not JSON"),
    "not UTF-8": (header_bytes(b"\xff\xfe"), "its header is not JSON"),
    "a list": (header_bytes([1]), "its header is not a JSON map"),
    "doubled key": (
        header_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
        "duplicate key",
    ),
    "unknown dtype": (header_bytes({"w": entry(dtype="F99")}, bytes(8)), "unknown dtype 'F99'"),
    "negative size": (header_bytes({"w": entry(shape=[-2])}, bytes(8)), "shape [-2]"),
    "text as size": (header_bytes({"w": entry(shape=["2"])}, bytes(8)), "shape ['2']"),
    "bool as size": (header_bytes({"w": entry(shape=[True])}, bytes(8)), "shape [True]"),
    "wrong size": (header_bytes({"w": entry(shape=[3])}, bytes(8)), "does not fill its 8 bytes"),
    "past the end": (header_bytes({"w": entry()}, bytes(4)), "its tensors end at byte"),
    "bytes left over": (header_bytes({"w": entry()}, bytes(9)), "its tensors end at byte"),
    "backwards": (header_bytes({"w": entry(data_offsets=[8, 0])}, bytes(8)), "does not fill"),
    "overlap": (
        header_bytes({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
        "overlap others or leave a gap",
    ),
    "gap": (
        header_bytes({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)),
        "overlap others or leave a gap",
    ),
    "metadata no map": (header_bytes({"__metadata__": 3}), "`__metadata__` is not a map"),
    "metadata not texts": (header_bytes({"__metadata__": {"a": 3}}), "`__metadata__` is not a map"),
    "missing keys": (header_bytes({"w": {"dtype": "F32"}}), "needs dtype, shape and data_offsets"),
    "huge product": (
        header_bytes({"w": entry(shape=[1 << 40, 1 << 40])}, bytes(8)),
        "does not fill its 8 bytes",
    ),
    "deep nesting": (header_bytes(b"[" * 100_000), "its header is not JSON"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_cannot_be_true_is_refused(tmp_path, case: str) -> None:
    content, message = LIES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unreadable_file_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_header(tmp_path)
