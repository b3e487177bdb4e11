"""Names of tensors, in memory and on disk.

Owns the one difference between them: the experts of a layer are stacked in memory, one tensor a
projection, and are a tensor each in a Hugging Face directory. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.layout.box import Shape
from launcher.weights.links import Link, stacked
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


def links(name: str, shape: Shape) -> list[Link] | None:
    """What a stacked expert parameter is in files; None for every other tensor."""
    names = unstacked(name, shape)
    return None if names is None else stacked(names, shape)


def is_multi_token_prediction(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor of a file belongs to a module that predicts further tokens.

    DeepSeek-V3 numbers those modules on after its layers; they are not part of the decoder.
    """
    extra = spec.hf_config.get("num_nextn_predict_layers") or 0
    if spec.decoder is None or not extra or not name.startswith("model.layers."):
        return False
    layer = name.split(".")[2]
    first = spec.decoder.num_hidden_layers
    return layer.isdecimal() and first <= int(layer) < first + extra
