"""Names of tensors, in memory and on disk.

Owns the one difference between a decoder of ours and its files: the experts of a layer are stacked
in memory, one tensor a projection, and are a tensor each in a Hugging Face directory; and what else
stands in files. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from launcher.layout.box import Shape
from launcher.weights.tensor_mapping import TensorMapping, stacked
from models.spec import ModelSpec

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def unstacked(name: str, shape: Sequence[int]) -> list[str] | None:
    """The names on disk of a stacked expert parameter [experts, ...]: entry e is `stacked[e]`.

    None for every other tensor, whose name is the same on disk. `shape` is the global one.
    """
    block, _, projection = name.rpartition(".")
    if not block.endswith(".experts") or projection not in _PROJECTIONS:
        return None
    spelling = _MIXTRAL[projection] if ".block_sparse_moe." in name else projection
    return [f"{block}.{expert}.{spelling}.weight" for expert in range(shape[0])]


def mappings(name: str, shape: Shape) -> list[TensorMapping] | None:
    """What a stacked expert parameter is in files; None for every other tensor."""
    names = unstacked(name, shape)
    return None if names is None else stacked(names, shape)


def is_multi_token_prediction(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor of a file belongs to a module that predicts further tokens.

    DeepSeek-V3 numbers those modules on after its layers; they are not part of the model.
    """
    extra = spec.hf_config.get("num_nextn_predict_layers") or 0
    first = spec.hf_config.get("num_hidden_layers")
    if first is None or not extra or not name.startswith("model.layers."):
        return False
    layer = name.split(".")[2]
    return layer.isdecimal() and first <= int(layer) < first + extra


def is_empty_expert(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor of a file is of shared experts in a model that has none: transformers writes
    matrices of no rows for them."""
    return ".mlp.shared_experts." in name and spec.hf_config.get("n_shared_experts") == 0


def in_any_layer(name: str) -> str:
    """The name of a tensor without the numbers of layers and experts in it: that of its kind."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def of_base_model(
    in_files: Collection[str], expected: Collection[str], prefix: str
) -> dict[str, str]:
    """Names of files of the base model alone, without its `prefix`, to those with it.

    Empty where the files use the prefix, and where it would not make a name that is `expected`.
    """
    start = f"{prefix}."
    if any(name.startswith(start) for name in in_files) or len(start) == 1:
        return {}
    known = set(expected)
    if not any(start + name in known for name in in_files):
        return {}
    return {name: start + name for name in in_files if name not in known}
