"""Weights for a device: the bytes of files are sent as they are, and give the same values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.layout.box import Box, full_box
from launcher.layout.shard import Shard
from launcher.streams import STREAMS
from launcher.weights.reading import read
from launcher.weights.reading.load import load
from launcher.weights.reading.unpack import unpack
from launcher.weights.source import open_complete
from tests.streams import LateStreams

FP8, STACK = (300, 200), (4, 96, 20)
TORCH_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in FP8 with scales of blocks, in MXFP4, and of the usual dtypes."""
    torch.manual_seed(0)
    n, inside, out = STACK
    held = {
        "q": (torch.randn(FP8) * 50).to(torch.float8_e4m3fn),
        "q_scale_inv": torch.randn(3, 2).abs() * 1e-3,
        "x_blocks": torch.randint(0, 256, (n, out, inside // 32, 16), dtype=torch.uint8),
        "x_scales": torch.randint(100, 140, (n, out, inside // 32), dtype=torch.uint8),
        **{name: torch.randn(90, 70).to(dtype) for name, dtype in TORCH_NAMES.items()},
    }
    folder = tmp_path_factory.mktemp("weights")
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def targets(dtype: torch.dtype) -> dict[str, Shard]:
    """A box that is not aligned to blocks of each tensor; one is not contiguous."""

    def part(shape: tuple[int, ...], *box: tuple[int, int]) -> Shard:
        found = Box(*zip(*box, strict=True))
        return Shard(shape, found, torch.full(found.size, float("nan"), dtype=dtype))

    turned = Shard((90, 70), full_box((90, 70)), torch.full((70, 90), 7.0, dtype=dtype).t())
    return {
        "q": part(FP8, (100, 150), (50, 130)),
        "x": part(STACK, (1, 3), (40, 50), (3, 11)),
        "float32": part((90, 70), (10, 60), (0, 70)),
        "bfloat16": part((90, 70), (10, 60), (5, 40)),
        "float16": turned,
    }


@pytest.mark.parametrize("dtype", [*TORCH_NAMES.values()])
@pytest.mark.parametrize("portion", [4 << 20, 700])
def test_values_on_a_device_are_those_on_the_host(
    folder: Path, dtype: torch.dtype, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host, on_device, streams = targets(dtype), targets(dtype), LateStreams()
    load(on_host, open_complete(folder))
    monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    monkeypatch.setattr(read, "DEVICE_SCALED_BYTES", portion)
    monkeypatch.setattr(read, "PORTION_BYTES", portion)
    report = load(on_device, open_complete(folder))
    assert report.bytes_read > 0
    for name, shard in on_host.items():
        assert not shard.tensor.isnan().any()
        assert torch.equal(on_device[name].tensor, shard.tensor), name
    assert streams.pending == 0
    pinned = [call.detail for call in streams.calls if call.what == "pinned"]
    assert len(pinned) <= 2 * read.READERS or portion < 4 << 20
    assert "MainThread" not in streams.threads("copy") | streams.threads("enter")
    assert streams.threads("wait for current") == {"MainThread"}


def test_what_is_sent_is_what_is_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is widened on the host."""
    streams, sent = LateStreams(), list[torch.dtype]()
    monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    plain = read._place

    def place(job: read.Fill, box: Box, stored: torch.Tensor, scales: torch.Tensor | None) -> None:
        sent.append(stored.dtype)
        plain(job, box, stored, scales)

    monkeypatch.setattr(read, "_place", place)
    load(targets(torch.bfloat16), open_complete(folder))
    assert {*sent} == {torch.float8_e4m3fn, torch.uint8, *TORCH_NAMES.values()}


def test_an_error_of_a_reader_leaves_no_copy_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = LateStreams()
    monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    monkeypatch.setattr(read, "PORTION_BYTES", 700)
    plain, left = read._place, iter(range(5))

    def fail(*arguments: object) -> None:
        if next(left, None) is None:
            raise MemoryError("no room on the device")
        plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(read, "_place", fail)
    with pytest.raises(MemoryError):
        load(targets(torch.float32), open_complete(folder))
    assert "copy" in streams.whats()
    assert streams.pending == 0


def test_powers_of_two_are_exact() -> None:
    """Also the smallest, which is subnormal; the largest code is infinity here."""
    blocks = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)  # all ones
    found = unpack(blocks, torch.arange(256, dtype=torch.uint8)[:, None])
    expected = [math.ldexp(1.0, code - 127) for code in range(255)]
    assert found[:255, 0].tolist() == expected
    assert found[255, 0] == math.inf
    assert found.shape == (256, 32)
