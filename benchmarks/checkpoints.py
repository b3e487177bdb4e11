"""Checkpoints to measure with: Hugging Face directories of a given size, made of random bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh
from launcher.weights.formats.safetensors import in_file_order
from launcher.weights.forms import INDEX_NAME
from launcher.weights.streaming.write import Part, write_file
from launcher.weights.tensor_mapping import shapes_in_files
from models.build import build_model, mappings_of
from models.families import model_spec
from models.spec import ModelSpec

FILE_BYTES = 2_000_000_000
_NOISE = memoryview(random.Random(0).randbytes(64 << 20))

_COMMON: dict[str, Any] = {
    "vocab_size": 32000, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
CONFIGS: dict[tuple[str, int], dict[str, Any]] = {
    ("dense", 2): _COMMON | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 20,
    },
    ("dense", 8): _COMMON | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 18,
    },
    ("moe", 2): _COMMON | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 1024,
        "intermediate_size": 2048, "moe_intermediate_size": 768, "num_experts": 64,
        "num_attention_heads": 8, "num_hidden_layers": 6,
    },
    ("moe", 8): _COMMON | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 4096, "moe_intermediate_size": 768, "num_experts": 64,
        "num_attention_heads": 16, "num_hidden_layers": 13,
    },
}  # fmt: skip
"""(kind, gigabytes) -> config.json."""
SMALL: dict[str, dict[str, Any]] = {
    kind: CONFIGS[kind, 2] | {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512,
                              "num_hidden_layers": 2} | more
    for kind, more in (("dense", {}), ("moe", {"moe_intermediate_size": 64, "num_experts": 8}))
}  # fmt: skip
"""The same with next to no weights."""


def spec_of(config: dict[str, Any]) -> ModelSpec:
    """The model a config.json describes."""
    return model_spec({}, config)


def make(folder: Path, config: dict[str, Any]) -> int:
    """Write the directory, if it is not there. Returns the bytes of its tensors."""
    spec = spec_of(config)
    model = build_model(spec, dtype=torch.bfloat16)
    shapes = shapes_in_files(
        {name: tuple(p.shape) for name, p in model.named_parameters()}, mappings_of(model)
    )
    parts = [Part(name, "BF16", shape, _noise) for name, shape in shapes.items()]
    total = sum(part.nbytes for part in parts)
    if (folder / INDEX_NAME).is_file():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[Part]] = [[]]
    for part in parts:
        if sum(p.nbytes for p in groups[-1]) + part.nbytes > FILE_BYTES:
            groups.append([])
        groups[-1].append(part)
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups, 1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        write_file(folder / file, in_file_order(group), {"format": "pt"})
        weight_map |= dict.fromkeys((part.name for part in group), file)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    index_text = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index_text))
    return total


def _noise(start: int, stop: int) -> memoryview:
    first = start % (len(_NOISE) - (8 << 20))
    return _NOISE[first : first + stop - start]


def layout_of(config: dict[str, Any], mesh: Mesh) -> Layout:
    """Where the tensors of the model lie on `mesh`."""
    from launcher.builders.layout import model_layout

    spec = spec_of(config)
    model = build_model(spec, dtype=torch.bfloat16)
    return model_layout(model, spec, mesh, split=None, vocab_emb_dp=False)
