"""FP8 weights: any box of them equals that box of the multiplied weight, or a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import launcher.weights.reading.read
from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.layout.shard import Shard
from launcher.weights.pieces import Pieces
from launcher.weights.reading.load import load
from launcher.weights.scales import Scales
from launcher.weights.source import open_complete
from tests.weights.directories import multiplied, quantised

SHAPE, BLOCK = (53, 47), (24, 20)
NAME, FACTORS = "a.weight", "a.weight_scale_inv"
CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}}


def tensors(factors: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 3
    low, scale = quantised(weight, BLOCK, factors)
    return {NAME: low, FACTORS: scale}


def write(folder: Path, content: dict[str, torch.Tensor], config: Any = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def target(box: Box, dtype: torch.dtype) -> dict[str, Shard]:
    return {NAME: Shard(SHAPE, box, torch.full(box.size, float("nan"), dtype=dtype))}


def of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scales")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {name: write(root / name, tensors(dtype)) for name, dtype in kinds.items()}


@settings(max_examples=60)
@given(data=st.data())
def test_any_box_is_that_box_of_the_whole(folders: dict[str, Path], data: st.DataObject) -> None:
    """Multiplied in float32 and cast then, however the box lies to the blocks, in any portions."""
    folder = folders[data.draw(st.sampled_from(sorted(folders)))]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    offset = [data.draw(st.integers(0, n - 1)) for n in SHAPE]
    size = [data.draw(st.integers(1, n - o)) for n, o in zip(SHAPE, offset, strict=True)]
    box = Box(tuple(offset), tuple(size))
    held = target(box, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launcher.weights.reading.read, "PORTION_BYTES", data.draw(st.sampled_from([7, 200]))
        )
        load(held, open_complete(folder))
    files = load_file(folder / "model.safetensors")
    expected = multiplied(files[NAME], files[FACTORS], BLOCK).to(dtype)
    assert torch.equal(held[NAME].tensor, of(expected, box))


def test_only_the_factors_of_the_blocks_that_a_box_meets_are_read(
    folders: dict[str, Path],
) -> None:
    scales = Scales(FACTORS, Pieces(), BLOCK)
    assert scales.needed(Box((24, 19), (24, 2))) == Box((1, 0), (1, 2))
    assert scales.needed(full_box(SHAPE)) == Box((0, 0), (3, 3))
    report = load(target(Box((24, 19), (24, 2)), torch.float32), open_complete(folders["float32"]))
    assert report.bytes_read == 24 * 2 * 1 + 2 * 4


def test_a_directory_without_a_block_size_has_blocks_of_128(tmp_path: Path) -> None:
    weight = torch.randn(130, 260)
    low, scale = quantised(weight, (128, 128))
    for name, config in (("none", None), ("plain", {"quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic"}})):  # fmt: skip
        folder = write(tmp_path / name, {"w": low, "w_scale_inv": scale}, config)
        held = {"w": Shard((130, 260), full_box((130, 260)), torch.empty(130, 260))}
        load(held, open_complete(folder))
        assert torch.equal(held["w"].tensor, multiplied(low, scale, (128, 128)))


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

BAD: dict[str, tuple[Change, Any, str]] = {
    "no factors": (
        lambda t: {NAME: t[NAME]},
        CONFIG,
        "`a.weight` is F8_E4M3 and there is no `a.weight_scale_inv`: every block of an FP8 weight "
        "is multiplied by a scale of that tensor.",
    ),
    "factors of a weight that has none": (
        lambda t: {NAME: t[NAME].bfloat16(), FACTORS: t[FACTORS]},
        CONFIG,
        "`a.weight` is BF16 and has scales: `a.weight_scale_inv`: only FP8 weights have scales.",
    ),
    "one factor too few": (
        lambda t: {NAME: t[NAME], FACTORS: t[FACTORS][:2]},
        CONFIG,
        "`a.weight_scale_inv` has the shape [2, 3]: `a.weight` has [53, 47], and blocks of 24 x "
        "20 share a scale.",
    ),
    "another block": (
        lambda t: t,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "blocks of 128 x 128 share a scale. Correct quantization_config.weight_block_size",
    ),
    "factors of one dim": (
        lambda t: {NAME: t[NAME], FACTORS: t[FACTORS].flatten()},
        CONFIG,
        "`a.weight_scale_inv` has the shape [9]",
    ),
    "whole numbers": (
        lambda t: {NAME: t[NAME], FACTORS: t[FACTORS].int()},
        CONFIG,
        "`a.weight_scale_inv` is I32: scales are floating point: F32, BF16, F16, F8_E8M0.",
    ),
    "another way": (
        lambda t: t,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config = {'quant_method': 'gptq'}: FP8 weights are read where blocks "
        "of them share a scale. Possible: quant_method fp8, weight_block_size [128, 128].",
    ),
    "no block": (
        lambda t: t,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
        "weight_block_size': None}: FP8 weights are read where blocks",
    ),
    "a list": (lambda t: t, [1], "config.json cannot be read (AttributeError)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_told_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    change, config, text = BAD[name]
    folder = write(tmp_path, change(tensors()), config)
    held = target(full_box(SHAPE), torch.float32)
    with pytest.raises(UserError) as caught:
        load(held, open_complete(folder))
    assert text in str(caught.value)
    assert str(folder) in str(caught.value)
    assert held[NAME].tensor.isnan().all()


def test_factors_in_8_bits_are_powers_of_two(tmp_path: Path) -> None:
    factors = torch.tensor([[0.5, 4.0, 1.0]] * 3).to(torch.float8_e8m0fnu)
    low = tensors()[NAME]
    folder = write(tmp_path, {NAME: low, FACTORS: factors})
    held = target(full_box(SHAPE), torch.float32)
    load(held, open_complete(folder))
    assert torch.equal(held[NAME].tensor, multiplied(low, factors, BLOCK))
