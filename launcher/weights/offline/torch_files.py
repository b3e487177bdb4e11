"""The weights in a file of torch, read by torch itself with `weights_only`, and mapped.

Owns the way from `torch.save` to named tensors that safetensors can hold. Nothing in a file is
executed. Files are mapped, not loaded, except those of torch before version 1.6, which must fit
into memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.weights.formats.torch_pickle import WEIGHT_KEYS, weight_key
from launcher.weights.forms import scalar_names
from launcher.weights.reading.tensor_bytes import DTYPE_NAMES, bytes_of
from launcher.weights.streaming.write import Part

_ZIP = b"PK\x03\x04"


def torch_parts(path: Path) -> tuple[dict[str, Part], list[str]]:
    """(name to tensor that can be written, keys that are left out) of a file of torch. Raises
    `UserError`."""
    weights, left_out = weights_in(path)
    parts = {
        name: Part(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape),
                   partial(_bytes, tensor.contiguous()))
        for name, tensor in weights.items()
    }  # fmt: skip
    return parts, left_out


def _bytes(tensor: torch.Tensor, start: int, stop: int) -> memoryview:
    """Bytes of a contiguous tensor, shared with it: its memory may be a mapped file."""
    return bytes_of(tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)[start:stop])


def weights_in(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(name to tensor, keys that are left out) of a file of torch. Raises `UserError`."""
    content, left_out = _loaded(path), list[str]()
    scalars: dict[str, torch.Tensor] = {}
    while isinstance(content, Mapping):
        scalars |= _scalars(content)
        inner = weight_key(path, content, _holds_tensors)
        if inner is None:
            break
        left_out += [str(key) for key in content if key != inner]
        content = content[inner]
    tensors = _tensors(content) if isinstance(content, Mapping) else {}
    if not tensors:
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else ""
        raise UserError(
            f"{path} holds no weights",
            rule="a map from name to tensor is needed, alone or under " + ", ".join(WEIGHT_KEYS),
            nearest=f"It holds: {found[:200]}" if found else "",
        )
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    tensors = {**scalars, **tensors}
    left_out += [str(key) for key in content if key not in tensors]
    return tensors, [key for key in left_out if key not in scalars]


def _scalars(content: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Step, epoch and other numbers of the run beside weights: integers as int64, others as
    float32, without dims."""
    dtypes = {int: torch.int64, float: torch.float32}
    return {
        key: torch.tensor(content[key], dtype=dtypes[type(content[key])])
        for key in sorted(scalar_names())
        if type(content.get(key)) in dtypes
    }


def _holds_tensors(content: Any) -> bool:
    if not isinstance(content, Mapping):
        return False
    return bool(_tensors(content)) or any(_holds_tensors(content.get(k)) for k in WEIGHT_KEYS)


def _tensors(content: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {
        key: value.detach() for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }  # fmt: skip


def _loaded(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{path} refers to {named[1]}, which is not allowed" if named else
            f"{path} cannot be read",
            rule="tensors, numbers, texts, lists and maps are read, and nothing in a file is run"
            if named else str(error).splitlines()[0][:200],
            advice="If you trust its origin, load it there and save its tensors alone: "
            "torch.save(module.state_dict(), path)" if named else "Copy it again from its origin",
        ) from None  # fmt: skip


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.dtype not in DTYPE_NAMES:
        kind = tensor.dtype if tensor.layout is torch.strided else tensor.layout
        raise UserError(
            f"{path}: `{name}` is {str(kind).removeprefix('torch.')}",
            rule="safetensors has no such tensors",
            advice="Save it dense, in another dtype",
        )
