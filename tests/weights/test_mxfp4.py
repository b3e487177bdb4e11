"""Weights in 4 bits: any box of them holds the numbers that transformers unpacks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.layout.shard import Shard
from launcher.weights.mxfp4 import packed_of
from launcher.weights.reading import read
from launcher.weights.reading.load import load
from launcher.weights.reading.unpack import unpack
from launcher.weights.source import open_complete
from tests.weights.directories import in_4_bits

SHAPE = (5, 96, 14)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a stack `w` in 4 bits, of any numbers, and its biases."""
    torch.manual_seed(0)
    n, inside, out = SHAPE
    blocks = torch.randint(0, 256, (n, out, inside // 32, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (n, out, inside // 32), dtype=torch.uint8)
    held = {"w_blocks": blocks, "w_scales": scales, "w_bias": torch.randn(n, out)}
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def expected_of(folder: Path) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    held = load_file(folder / "model.safetensors")
    return convert_moe_packed_tensors(held["w_blocks"], held["w_scales"], dtype=torch.float32)


def loaded(folder: Path, box: Box, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    target = torch.full(box.size, float("nan"), dtype=dtype)
    bias = torch.empty(SHAPE[0], SHAPE[2])
    whole = Box((0, 0), tuple(bias.shape))
    load({"w": Shard(SHAPE, box, target), "w_bias": Shard(whole.size, whole, bias)},
         open_complete(folder))  # fmt: skip
    return target


@pytest.mark.parametrize("portion", [read.SCALED_BYTES, 48])
def test_any_box_holds_the_numbers_of_transformers(
    folder: Path, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SCALED_BYTES", portion)
    expected, draw = expected_of(folder), random.Random(3)
    assert tuple(expected.shape) == SHAPE
    boxes = [Box((0, 0, 0), SHAPE)]
    for _ in range(12):
        offset = tuple(draw.randrange(size) for size in SHAPE)
        boxes.append(
            Box(offset, tuple(draw.randint(1, s - o) for s, o in zip(SHAPE, offset, strict=True)))
        )
    for box in boxes:
        place = tuple(slice(o, o + n) for o, n in zip(*box, strict=True))
        assert torch.equal(loaded(folder, box), expected[place]), box


def test_bfloat16_holds_them_exactly(folder: Path) -> None:
    values = loaded(folder, Box((0, 0, 0), SHAPE), torch.bfloat16)
    assert torch.equal(values.float(), expected_of(folder))


def test_a_stack_of_another_shape_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"w.*\[5, 96, 14\].*\[5, 14, 96\]"):
        load({"w": Shard((5, 14, 96), Box((0, 0, 0), (5, 14, 96)), torch.empty(5, 14, 96)),
              "w_bias": Shard((5, 14), Box((0, 0), (5, 14)), torch.empty(5, 14))},
             open_complete(folder))  # fmt: skip


def test_names_alone_are_not_enough(tmp_path: Path) -> None:
    held = {"a_blocks": torch.zeros(2, 4, 3, 16), "a_scales": torch.zeros(2, 4, 3),
            "b_blocks": torch.zeros(2, 4, 3, 16, dtype=torch.uint8)}  # fmt: skip
    save_file(held, tmp_path / "model.safetensors")
    assert packed_of(open_complete(tmp_path).tensors) == {}


def test_what_the_tests_pack_is_near_to_what_it_was() -> None:
    stack = torch.randn(3, 64, 6)
    unpacked = unpack(*in_4_bits(stack)).transpose(1, 2)
    assert (unpacked - stack).abs().max() < 0.3 * stack.abs().max()
    assert not torch.equal(unpacked, stack)
