"""Rotary position embeddings: inverse frequencies of every supported scaling, tables, rotation.

Owns the formulas; they follow transformers' `ROPE_INIT_FUNCTIONS` operation by operation, so tables
are bitwise equal. Frequencies are plain tensors, not buffers, so that they survive the meta device
and sharding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.spec import DecoderConfig


class RotaryTables:
    """Cosine and sine tables of one model."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        frequencies, self.attention_factor = inverse_frequencies(config)
        self._by_device = {frequencies.device: frequencies}

    def frequencies(self, device: torch.device) -> Tensor:
        """Inverse frequencies [rotary_dim / 2] in float32, cached by device."""
        cpu = torch.device("cpu")
        found = self._by_device.get(device)
        if found is None:
            found = self._by_device[cpu].to(device)
            if not torch.compiler.is_compiling():
                self._by_device[device] = found
        return found

    @property
    def by_position(self) -> bool:
        """Whether a table is a function of the position alone, not of the length of the row."""
        scaling = self.config.rope_scaling
        return not scaling or scaling["rope_type"] != "dynamic"

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [rows, 1, positions, rotary_dim / 2] in `dtype`, computed in float32."""
        frequencies = self.frequencies(position_ids.device)
        if not self.by_position:
            frequencies = self._stretched(frequencies, position_ids)
        angles = (position_ids[..., None].float() * frequencies).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def _stretched(self, frequencies: Tensor, position_ids: Tensor) -> Tensor:
        """Dynamic scaling: rows longer than the model's positions get a larger base. [rows, 1,
        rotary_dim / 2]

        A function of the row alone (transformers uses the longest batch so far), so that it does
        not depend on the batch.
        """
        length = position_ids.amax(dim=-1)[:, None, None] + 1
        longest = self.config.max_position_embeddings
        factor, dim = self.config.rope_scaling["factor"], self.config.rotary_dim  # type: ignore[index]
        growth = (factor * length / longest) - (factor - 1)
        base = self.config.rope_theta * growth ** (dim / (dim - 2))
        steps = torch.arange(0, dim, 2, dtype=torch.float, device=frequencies.device) / dim
        return torch.where(length > longest, 1.0 / (base**steps), frequencies)


def widened(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of `rotate_wide` [..., rotary_dim] from those of `rotate` [..., rotary_dim / 2]."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_wide(
    states: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> Tensor:  # fmt: skip
    """As `rotate`, bit by bit, with half the operations, by tables of `widened`; for inference, as
    its gradient has other roundings."""
    width = cos.shape[-1]
    if width < states.shape[-1]:
        rotary, rest = states.split((width, states.shape[-1] - width), dim=-1)
        return torch.cat((rotate_wide(rotary, cos, sin, interleaved=interleaved), rest), dim=-1)
    wide = states.to(cos.dtype)
    if interleaved:
        wide = wide.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return (wide * cos + wide.roll(width // 2, -1) * sin).to(states.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate `states` [rows, heads, positions, head_dim] in the dtype of the tables, and cast back.

    Pairs are in the two halves of a head, or, `interleaved`, adjacent; the result always has them
    in the two halves. With narrower tables, the trailing dimensions of a head are not rotated.
    """
    width = 2 * cos.shape[-1]
    if width < states.shape[-1]:
        rotary, rest = states.split((width, states.shape[-1] - width), dim=-1)
        return torch.cat((rotate(rotary, cos, sin, interleaved=interleaved), rest), dim=-1)
    wide = states.to(cos.dtype)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(states.dtype)


def inverse_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] (float32, CPU) and the factor of cosines and sines."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    theta, dim = config.rope_theta, config.rotary_dim
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float, device="cpu") / dim)
    plain = 1.0 / powers
    match scaling["rope_type"]:
        case "default" | "dynamic":
            return plain, 1.0
        case "linear":
            return plain / scaling["factor"], 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(powers, theta, dim, scaling), _yarn_attention_factor(scaling)
    raise ValueError(f"unknown rope_type {scaling['rope_type']}")


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, others blended (Llama 3.1)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / plain
    scaled = torch.where(wavelengths > original / low, plain / factor, plain)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * scaled / factor + blend * scaled
    between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(between, blended, scaled)


def _yarn(powers: Tensor, theta: float, dim: int, scaling: Mapping[str, Any]) -> Tensor:
    """Extrapolation and interpolation blended by a ramp over the dimensions
    (https://arxiv.org/abs/2309.00071)."""
    original = scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp(
        (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1
    )
    extrapolated = 1 - ramp
    return 1.0 / (scaling["factor"] * powers) * (1 - extrapolated) + 1.0 / powers * extrapolated


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    factor = scaling["factor"]
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    return _mscale(factor, 1)


def score_factor(scaling: Mapping[str, Any] | None) -> float:
    """The additional factor of the scores of latent attention: the square of YaRN's `mscale` with
    `mscale_all_dim`."""
    if not scaling or not scaling.get("mscale_all_dim"):
        return 1.0
    return _mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
