"""Names of tensors, in memory and on disk.

Owns the one difference between the decoder and its files: in memory the experts of a layer are
stacked, one tensor a projection, while most families have one tensor an expert in a Hugging Face
directory; and which other tensors the files may hold. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from launcher.layout.box import Shape
from launcher.weights.tensor_mapping import MappingsOf, TensorMapping, stacked
from models.plan import kind_of
from models.spec import ModelSpec, Rule


def unstacked(name: str, shape: Sequence[int], parameters: Mapping[str, Rule]) -> list[str] | None:
    """The names on disk of a stacked expert parameter [experts, ...]: entry e is `stacked[e]`.

    None for every other tensor, whose name is the same on disk. `shape` is the global one,
    `parameters` are the rules of the family.
    """
    rule = parameters.get(kind_of(name))
    if rule is None or not rule.entry:
        return None
    block = name.rpartition(".")[0]
    return [f"{block}.{expert}.{rule.entry}" for expert in range(shape[0])]


def mappings_of(parameters: Mapping[str, Rule]) -> MappingsOf:
    """The mapping from stacked expert parameters to tensors in files, by the rules of a family."""

    def mappings(name: str, shape: Shape) -> list[TensorMapping] | None:
        names = unstacked(name, shape, parameters)
        return None if names is None else stacked(names, shape)

    return mappings


def is_multi_token_prediction(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor of a file belongs to a multi-token prediction (MTP) module.

    DeepSeek-V3 stores those modules as further layers; they are not part of the model.
    """
    extra = spec.hf_config.get("num_nextn_predict_layers") or 0
    first = spec.hf_config.get("num_hidden_layers")
    if first is None or not extra or not name.startswith("model.layers."):
        return False
    layer = name.split(".")[2]
    return layer.isdecimal() and first <= int(layer) < first + extra


def is_empty_expert(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor of a file belongs to shared experts in a model without any: transformers
    writes matrices without rows for them."""
    return ".mlp.shared_experts." in name and spec.hf_config.get("n_shared_experts") == 0


def in_any_layer(name: str) -> str:
    """The name of a tensor with `*` for the numbers of layers and experts."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def of_base_model(
    in_files: Collection[str], expected: Collection[str], prefix: str
) -> dict[str, str]:
    """Names in files of the base model alone, without its `prefix` -> names with it.

    Empty if the files use the prefix, or if no name with the prefix is `expected`.
    """
    start = f"{prefix}."
    if any(name.startswith(start) for name in in_files) or len(start) == 1:
        return {}
    known = set(expected)
    if not any(start + name in known for name in in_files):
        return {}
    return {name: start + name for name in in_files if name not in known}
