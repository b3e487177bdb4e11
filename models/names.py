"""Names of tensors, in memory and on disk.

Owns the differences between the decoder and its files: in memory the experts of a layer are
stacked, one tensor a projection, while most families have one tensor an expert in a Hugging Face
directory; some families have other names there (`Rule.in_files`); and which other tensors the files
may hold. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from launcher.layout.box import Shape, full_box
from launcher.weights.tensor_mapping import MappingsOf, TensorMapping, stacked
from models.plan import kind_of
from models.spec import ModelSpec, Rule


def unstacked(name: str, shape: Sequence[int], parameters: Mapping[str, Rule]) -> list[str] | None:
    """The names on disk of a stacked expert parameter [experts, ...]: entry e is `stacked[e]`.

    None for every other tensor, whose name is the same on disk. `shape` is the global one,
    `parameters` are the rules of the family.
    """
    rule = parameters.get(kind_of(name))
    if rule is None or not rule.is_stacked:
        return None
    if rule.in_files:
        return [rule.in_files.format(layer=_layer_of(name), expert=e) for e in range(shape[0])]
    block = name.rpartition(".")[0]
    return [f"{block}.{expert}.{rule.entry}" for expert in range(shape[0])]


def in_files(name: str, parameters: Mapping[str, Rule]) -> str:
    """The name in files of a tensor of the decoder that is one tensor there."""
    rule = parameters.get(kind_of(name))
    if rule is None or not rule.in_files:
        return name
    return rule.in_files.format(layer=_layer_of(name))


def _layer_of(name: str) -> str:
    """The number of the layer of a tensor of the decoder; empty outside of layers."""
    return name.split(".")[2] if name != kind_of(name) else ""


def in_decoder(names: Collection[str], spec: ModelSpec) -> dict[str, str]:
    """Names in files -> names in the decoder, of those of `names` where they differ; without those
    of experts, which are stacked."""
    if spec.decoder is None:
        return {}
    renamed = {}
    for kind, rule in spec.decoder.parameters.items():
        layers = range(spec.decoder.num_hidden_layers) if "{layer}" in rule.in_files else (None,)
        for layer in layers if rule.in_files and not rule.is_stacked else ():
            name = rule.in_files.format(layer=layer)
            if name in names:
                renamed[name] = kind if layer is None else f"model.layers.{layer}.{kind}"
    return renamed


def mappings_of(parameters: Mapping[str, Rule]) -> MappingsOf:
    """The mapping from parameters to tensors in files, by the rules of a family."""

    def mappings(name: str, shape: Shape) -> list[TensorMapping] | None:
        names = unstacked(name, shape, parameters)
        if names is not None:
            return stacked(names, shape)
        renamed = in_files(name, parameters)
        return None if renamed == name else [TensorMapping(renamed, full_box(shape))]

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
