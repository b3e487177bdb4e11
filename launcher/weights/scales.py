"""Block scales of FP8 weights: which tensor holds them, which of them a box needs. Torch-free.

Owns the format in which DeepSeek-V3 is published: each block of `x.weight` (128 x 128 by default)
is multiplied by one entry of `x.weight_scale_inv`. Other quantization methods are refused.

    weight [300, 200]    rows 100..250, columns 130..200  need  scales [0:2, 1:2] of [3, 2]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.weights.pieces import Pieces

if TYPE_CHECKING:
    from launcher.weights.source import Source

SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)
POSSIBLE = "quant_method fp8, weight_block_size [128, 128]"
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_FACTORS = ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True)
class Scales:
    """The scales of a tensor: one for each block."""

    name: str
    pieces: Pieces
    block: tuple[int, int]
    """(rows, columns) of the tensor that share a scale."""

    def needed(self, box: Box) -> Box:
        """The box of scales whose blocks overlap `box` of the tensor."""
        stops = [start + size for start, size in zip(box.offset, box.size, strict=True)]
        first = [start // n for start, n in zip(box.offset, self.block, strict=True)]
        last = [-(-stop // n) for stop, n in zip(stops, self.block, strict=True)]
        return Box(tuple(first), tuple(b - a for a, b in zip(first, last, strict=True)))


def factors_of(tensors: Mapping[str, Pieces]) -> dict[str, str]:
    """FP8 weight to the tensor of its scales, for those that have one."""
    return {
        name: name + SUFFIX
        for name, pieces in tensors.items()
        if name + SUFFIX in tensors and pieces[0].entry.dtype in EIGHT_BITS
    }


def block_of(quantization_config: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by `quantization_config` of a config.json; None for
    another quantization method."""
    if not isinstance(quantization_config, Mapping):
        return None
    block = quantization_config.get("weight_block_size", DEFAULT_BLOCK)
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if quantization_config.get("quant_method") != "fp8" or not is_pair:
        return None
    rows, columns = block
    if not all(type(n) is int and n > 0 for n in (rows, columns)):
        return None
    return rows, columns


def block_in(folder: Path) -> tuple[int, int]:
    """The block of the weights in `folder`, by its config.json; 128 x 128 without one.

    Raises `UserError` for another quantization method.
    """
    config = folder / "config.json"
    if not config.is_file():
        return DEFAULT_BLOCK
    try:
        content = json.loads(config.read_bytes())
        written = content.get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{config} cannot be read ({type(error).__name__})",
            rule="FP8 weights need its quantization_config",
            advice="Copy config.json from the origin of the weights",
        ) from error
    if not written:
        return DEFAULT_BLOCK
    block = block_of(written)
    if block is None:
        raise UserError(
            f"{config}: quantization_config = {_shown(written)}",
            rule="FP8 weights are read where blocks of them share a scale",
            nearest=f"Possible: {POSSIBLE}",
            advice="Give weights that are not quantized",
        )
    return block


def _shown(written: Any) -> str:
    if not isinstance(written, Mapping):
        return repr(written)[:60]
    known = {key: written[key] for key in ("quant_method", "weight_block_size") if key in written}
    return repr(known)[:120]


def scales_of(source: Source, name: str) -> Scales | None:
    """The scales of tensor `name`; None where it is not FP8. Raises `UserError` where they are
    missing or do not fit."""
    if source.dtype(name) not in EIGHT_BITS:
        return None
    factors = source.scales.get(name)
    if factors is None:
        raise UserError(
            f"`{name}` is {source.dtype(name)} and there is no `{name}{SUFFIX}`",
            where=str(source.path),
            rule="every block of an FP8 weight is multiplied by a scale of that tensor",
            advice="Copy all files of the weights, or give weights that are not quantized",
        )
    rows, columns = block = source.scale_block
    shape, held = source.shape(name), source.shape(factors)
    if len(shape) != 2 or held != (-(-shape[0] // rows), -(-shape[1] // columns)):
        raise UserError(
            f"`{factors}` has the shape {list(held)}",
            where=str(source.path),
            rule=f"`{name}` has {list(shape)}, and blocks of {rows} x {columns} share a scale",
            advice="Correct quantization_config.weight_block_size in config.json",
        )
    if source.dtype(factors) not in _FACTORS:
        raise UserError(
            f"`{factors}` is {source.dtype(factors)}",
            where=str(source.path),
            rule=f"scales are floating point: {', '.join(_FACTORS)}",
            advice="Copy the weights again from their origin",
        )
    return Scales(factors, source.tensors[factors], block)


def check_idle(source: Source, names: Iterable[str]) -> None:
    """Check that none of `names`, tensors that are not loaded, holds scales of a weight that is not
    FP8. Raises `UserError`."""
    for name in names:
        weight = name.removesuffix(SUFFIX)
        if weight != name and weight in source.tensors:
            raise UserError(
                f"`{weight}` is {source.dtype(weight)} and has scales: `{name}`",
                where=str(source.path),
                rule="only FP8 weights have scales",
                advice=f"Remove `{name}` if the weights were multiplied by it, or give the "
                "FP8 weights",
            )
