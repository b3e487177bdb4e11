"""Names of tensors of a transformers module, in memory and on disk.

Owns the mappings of such a module, derived from transformers' weight conversion: its experts may be
stacked, gate and up fused, prefixes renamed. The conversion runs on meta tensors; a tensor of
the files that is a view of a parameter is a box of it, given by the offset and strides of the view.
Invariant: the tensors of the files tile every tensor of the module, or the module is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.layout.box import Box, Shape, full_box
from launcher.weights.reading.strided_copy import c_strides
from launcher.weights.tensor_mapping import TensorMapping

Mappings = Mapping[str, tuple[TensorMapping, ...]]
"""Tensor of the module -> its tensors in files; without those that are the same under one name."""


def mappings_of_module(module: Any) -> Mappings:
    """The mapping from tensors of a `PreTrainedModel` to those that `save_pretrained` writes.

    Raises UserError if the latter are not boxes of the former: transposed, permuted or computed
    tensors, or one tensor for several of the module.
    """
    from transformers.core_model_loading import revert_weight_conversion

    originals = {name: _Original(tensor) for name, tensor in _tensors(module)}
    owners = {_memory(original): name for name, original in originals.items()}
    found: dict[str, list[TensorMapping]] = {}
    for file_name, view in revert_weight_conversion(module, dict(originals)).items():
        name = owners.get(_memory(view))
        mapping = _mapping(file_name, view, tuple(originals[name].shape)) if name else None
        if name is None or mapping is None:
            raise _other_tensors(module, file_name)
        found.setdefault(name, []).append(mapping)
    for name, original in originals.items():
        if not _tiled(found.get(name, ()), tuple(original.shape)):
            raise _other_tensors(module, name)
    return {
        name: tuple(mappings) for name, mappings in found.items()
        if mappings != [TensorMapping(name, full_box(tuple(originals[name].shape)))]
    }  # fmt: skip


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors in files; a tied tensor under both names, which may differ in files."""
    yield from module.state_dict(keep_vars=True).items()


class _Original(Tensor):
    """A meta tensor of the shape of another, whose slices always stay views of it."""

    @staticmethod
    def __new__(cls, like: Tensor) -> _Original:
        return torch.empty(like.shape, device="meta").as_subclass(cls)

    def contiguous(self, *_: Any, **__: Any) -> _Original:  # type: ignore[override]
        return self


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _mapping(file_name: str, view: Tensor, shape: Shape) -> TensorMapping | None:
    """The box of a tensor of `shape` that the view is; None if it is not one."""
    kept = _kept_dims(view, shape)
    if kept is None:
        return None
    position, offset = view.storage_offset(), []
    for stride in c_strides(shape, 1):
        offset.append(position // max(stride, 1))
        position %= max(stride, 1)
    size = [1] * len(shape)
    for dim, length in zip(kept, view.shape, strict=True):
        size[dim] = length
    dropped = tuple(dim for dim in range(len(shape)) if dim not in kept)
    return TensorMapping(file_name, Box(tuple(offset), tuple(size)), dropped)


def _kept_dims(view: Tensor, shape: Shape) -> list[int] | None:
    """The dim of a tensor of `shape` that each dim of the view is, in order; None if the view has
    other dims."""
    kept: list[int] = []
    strides = c_strides(shape, 1)
    for length, stride in zip(view.shape, view.stride(), strict=True):
        after = kept[-1] + 1 if kept else 0
        fitting = [
            dim for dim in range(after, len(shape))
            if strides[dim] == stride and length <= shape[dim]
        ]  # fmt: skip
        if not fitting:
            return None
        kept.append(fitting[0])
    return kept


def _tiled(mappings: Sequence[TensorMapping], shape: Shape) -> bool:
    """Whether the boxes of `mappings` cover every element of a tensor of `shape` once."""
    boxes = {mapping.box for mapping in mappings}
    is_once = (
        len(boxes) == len(mappings) and sum(box.numel for box in boxes) == full_box(shape).numel
    )
    if not is_once or any(a.intersect(b) is not None for a, b in combinations(boxes, 2)):
        return False
    return all(
        start + length <= n
        for box in boxes
        for start, length, n in zip(box.offset, box.size, shape, strict=True)
    )


def _other_tensors(module: Any, name: str) -> UserError:
    return UserError(
        f"model_type {module.config.model_type}: its files and its module have different tensors "
        f"(`{name}`)",
        rule="a tensor in files must be a slice of one tensor of the module",
        advice="Use a model of another family",
    )
