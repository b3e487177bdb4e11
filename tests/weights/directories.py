"""Tiny Hugging Face directories of every family, and the same in 8 bits as DeepSeek publishes, in 4
bits as gpt-oss is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.spec import ModelSpec
from tests.models import tiny
from tests.models.tiny import dense_spec, experts_spec, module_spec, oracle
from tests.workshop import VOCABULARY

BLOCK = (24, 20)
"""Small and odd, so that no cut of a tiny model meets the lines between blocks."""

DENSE: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig"},
    "mistral": {"type": "MistralConfig", "sliding_window": 7},
    "qwen2": {"type": "Qwen2Config", "tie_word_embeddings": True},
    "qwen2.5": {"type": "Qwen2Config", "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "qwen3": {"type": "Qwen3Config", "head_dim": 24},
    **tiny.GLM,
}
EXPERTS = tuple(tiny.EXPERTS)
MODULES = ("gpt_neox", "phi3", "qwen2_moe")
"""Without a decoder of ours; the first two have q, k and v in one tensor."""


def spec_of(family: str, **more: Any) -> ModelSpec:
    """A tiny model of `family`, whose vocabulary is that of the workshop's tokenizer."""
    more = {"vocab_size": VOCABULARY, **more}
    if family in DENSE:
        return dense_spec(**DENSE[family] | more)
    return experts_spec(family, **more) if family in EXPERTS else module_spec(family, **more)


def save(module: nn.Module, folder: Path, **config: Any) -> Path:
    """`module` as transformers saves it; `config` is added to its config.json."""
    module.save_pretrained(folder)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def make(family: str, folder: Path, **more: Any) -> Path:
    """A random model of `family` in `folder`."""
    return save(oracle(spec_of(family, **more)), folder)


def make_in_8_bits(
    origin: Path, folder: Path, *, block: tuple[int, int] = BLOCK,
    factors: torch.dtype = torch.float32,
) -> tuple[Path, Path]:  # fmt: skip
    """Two directories beside each other in `folder`: `fp8`, the projections of `origin` in 8 bits
    with a factor a block, and `plain`, the same multiplied out in float32."""
    low, plain = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in load_file(origin / "model.safetensors").items():
        low[name] = plain[name] = tensor
        if name.endswith("_proj.weight"):
            low[name], low[f"{name}_scale_inv"] = quantised(tensor, block, factors)
            plain[name] = multiplied(low[name], low[f"{name}_scale_inv"], block)
    config = json.loads((origin / "config.json").read_text())
    written = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    for name, tensors, more in (
        ("fp8", low, {"quantization_config": written}), ("plain", plain, {}),
    ):  # fmt: skip
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config | more))
    return folder / "fp8", folder / "plain"


def quantised(
    weight: torch.Tensor, block: tuple[int, int], factors: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` in 8 bits, and the factor of each block, under which its largest entry fits."""
    rows, columns = block
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    scale = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = part.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    scale = scale.to(factors)
    return (weight / spread(scale, block, weight.shape)).to(torch.float8_e4m3fn), scale


def multiplied(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:  # fmt: skip
    """The weight that is meant, float32."""
    return weight.float() * spread(scale, block, weight.shape)


def spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """The factor of every element, float32."""
    rows = torch.arange(shape[0]) // block[0]
    columns = torch.arange(shape[1]) // block[1]
    return scale.float()[rows][:, columns]


def make_in_4_bits(origin: Path, folder: Path) -> tuple[Path, Path]:
    """Two directories beside each other in `folder`: `mxfp4`, the stacks of experts of `origin` in
    4 bits, and `plain`, the same numbers in float32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    low, plain = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in load_file(origin / "model.safetensors").items():
        low[name] = plain[name] = tensor
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del low[name]
            low[f"{name}_blocks"], low[f"{name}_scales"] = parts = in_4_bits(tensor)
            plain[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32).contiguous()
    config = json.loads((origin / "config.json").read_text())
    written = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    for name, tensors, more in (
        ("mxfp4", low, {"quantization_config": written}), ("plain", plain, {}),
    ):  # fmt: skip
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config | more))
    return folder / "mxfp4", folder / "plain"


def in_4_bits(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks [n, out, in / 32, 16], scales [n, out, in / 32]), uint8, of a stack [n, in, out]."""
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat((numbers, -numbers))
    groups = stack.transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = torch.frexp(groups.abs().amax(-1)).exponent - 3
    scaled = torch.ldexp(groups, -exponent[..., None])
    nearest = (scaled[..., None] - numbers).abs().argmin(-1).to(torch.uint8)
    return nearest[..., ::2] | nearest[..., 1::2] << 4, (exponent + 127).to(torch.uint8)
