"""Rotary position embeddings: inverse frequencies of every supported scaling, tables, rotation.

Owns the formulas; they follow transformers' `ROPE_INIT_FUNCTIONS` operation by operation, so tables
are equal to the bit. Frequencies are plain tensors, never buffers: a model may go through the meta
device and sharding without losing them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.spec import DecoderConfig


class RotaryTables:
    """Cosines and sines for given positions, for one model."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        frequencies, self.attention_factor = inverse_frequencies(config)
        self._by_device = {frequencies.device: frequencies}

    def frequencies(self, device: torch.device) -> Tensor:
        """Inverse frequencies [rotary_dim / 2] in float32, kept per device."""
        cpu = torch.device("cpu")
        found = self._by_device.get(device)
        if found is None:
            found = self._by_device[cpu].to(device)
            if not torch.compiler.is_compiling():
                self._by_device[device] = found
        return found

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [rows, 1, positions, rotary_dim / 2] in `dtype`, computed in float32."""
        frequencies = self.frequencies(position_ids.device)
        if self.config.rope_scaling and self.config.rope_scaling["rope_type"] == "dynamic":
            frequencies = self._stretched(frequencies, position_ids)
        angles = (position_ids[..., None].float() * frequencies).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def _stretched(self, frequencies: Tensor, position_ids: Tensor) -> Tensor:
        """Dynamic scaling: rows longer than the model's positions get a larger base. [rows, 1,
        rotary_dim / 2]

        A function of the row alone (transformers remembers the longest batch it saw), so that it
        does not matter which rows share a batch.
        """
        length = position_ids.amax(dim=-1)[:, None, None] + 1
        longest = self.config.max_position_embeddings
        factor, dim = self.config.rope_scaling["factor"], self.config.rotary_dim  # type: ignore[index]
        growth = (factor * length / longest) - (factor - 1)
        base = self.config.rope_theta * growth ** (dim / (dim - 2))
        steps = torch.arange(0, dim, 2, dtype=torch.float, device=frequencies.device) / dim
        return torch.where(length > longest, 1.0 / (base**steps), frequencies)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate `states` [rows, heads, positions, head_dim], in the dtype of the tables, back to its
    own dtype.

    A number is rotated with its partner in the other half, or, `interleaved`, with its neighbour;
    either way the first partners come out in the first half. Where the tables are for fewer
    numbers, the last ones of a head stay as they are.
    """
    width = 2 * cos.shape[-1]
    if width < states.shape[-1]:
        turned, kept = states.split((width, states.shape[-1] - width), dim=-1)
        return torch.cat((rotate(turned, cos, sin, interleaved=interleaved), kept), dim=-1)
    wide = states.to(cos.dtype)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(states.dtype)


def inverse_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] (float32, CPU) and the factor on cosines and sines."""
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
    """Interpolated below, extrapolated above a ramp over the dimensions
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
        return _magnitude(factor, scaling["mscale"]) / _magnitude(factor, scaling["mscale_all_dim"])
    return _magnitude(factor, 1)


def score_factor(scaling: Mapping[str, Any] | None) -> float:
    """What latent attention multiplies its scores by besides: the square of yarn's magnitude over
    all dimensions."""
    if not scaling or not scaling.get("mscale_all_dim"):
        return 1.0
    return _magnitude(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
