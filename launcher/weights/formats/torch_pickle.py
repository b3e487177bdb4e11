"""Files of torch (`.pt`, `.pth`, `.bin`, `.ckpt`): which tensors they hold, and where.

Owns the way from the pickle of `torch.save` to entries with offsets and strides. Torch-free.
Invariants: nothing in a file is run and no tensor is loaded; a header is used only after the span
of every tensor was checked against its storage, and the storage against the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.weights.formats.pickles import (
    BrokenPickleError,
    Call,
    Named,
    RefusedCallError,
    read_pickle,
)
from launcher.weights.formats.safetensors import ITEM_BYTES, MAX_DIMS, Entry, Header
from launcher.weights.formats.torch_archive import Archive, Span, broken

WEIGHT_KEYS = ("state_dict", "model", "module", "model_state_dict")
"""Keys of the weights in a file that holds more than weights."""
_DEPTH = 4
"""Nested dicts that are searched for weights."""

_STORAGES = {
    "Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "ComplexFloat": "C64",
    "Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
_DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_NO_TENSORS = (
    "torch.Size", "torch.device", "torch.serialization._get_layout",
    "_codecs.encode", "collections.Counter",
    "builtins.set", "builtins.frozenset", "builtins.bytearray", "builtins.complex",
    "__builtin__.set", "__builtin__.frozenset", "__builtin__.bytearray", "__builtin__.complex",
)  # fmt: skip
"""Constructors of plain values, by their names in Python 3 and 2."""
_PLAIN_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


@dataclass(frozen=True, slots=True)
class _Storage:
    """The memory that tensors are views of: its archive member and its dtype."""

    key: str
    dtype: str
    """Its safetensors name, or that of torch where there is none; empty: bytes."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage. Offset and strides are in elements."""

    storage: _Storage
    offset: int
    shape: Shape
    strides: Shape
    dtype: str


def read_header(path: Path) -> Header:
    """The tensors of the file of torch at `path`, as entries with strides.

    Of a file that holds more than weights (`{"state_dict": ..., "epoch": 3}`) the weights are read;
    other values are left out. Raises `UserError`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            archive = Archive(path, file)
            archive.check_byte_order()
            pickled = archive.read("data.pkl")
            tensors = _weights(path, _content(path, pickled))
            spans = {key: archive.span(f"data/{key}") for key in _keys(tensors)}
            entries = {
                name: _entry(path, name, tensor, spans[tensor.storage.key])
                for name, tensor in tensors.items()
            }
            digest = xxhash.xxh3_64_hexdigest(pickled)
            modified = os.fstat(descriptor).st_mtime_ns
            return Header(entries, {}, 0, archive.file_bytes, digest, modified, extension=".pt")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def refuse_legacy(path: Path) -> NoReturn:
    """Raise `UserError` for a file that torch wrote before version 1.6."""
    raise UserError(
        f"{path} was written by torch before version 1.6",
        rule="files of torch are zip archives, from which tensors are read one by one",
        advice="Convert it: python -m launcher.tools.ckpt_to_safetensors",
    )


def refuse_pickle(path: Path) -> NoReturn:
    """Raise `UserError` for a pickle of another program."""
    raise UserError(
        f"{path} is a pickle that torch did not write",
        rule="files of torch are zip archives, from which tensors are read one by one",
        advice="Give weights as safetensors, or as torch.save writes them",
    )


def _content(path: Path, pickled: bytes) -> Any:
    try:
        return read_pickle(pickled, _CALLS, _storage)
    except RefusedCallError as error:
        raise UserError(
            f"{path} refers to {error}, which is not allowed",
            rule="tensors, numbers, texts, lists and maps are read, and nothing in a file is run",
            advice="If you trust its origin, load it there and save its tensors alone: "
            "torch.save(module.state_dict(), path)",
        ) from None
    except BrokenPickleError as error:
        raise broken(path, f"its data.pkl cannot be read ({error})") from error


def _weights(path: Path, content: Any) -> dict[str, _Tensor]:
    """Name to tensor: of the dict itself, or of the dict inside it that holds the weights."""
    for _ in range(_DEPTH):
        if not isinstance(content, dict):
            break
        key = weight_key(path, content, lambda inner: _has_tensors(inner, _DEPTH))
        if key is None:
            break
        content = content[key]
    found = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in found if isinstance(value, _Tensor)}
    if not tensors:
        raise UserError(
            f"{path} holds no weights",
            rule="a map from name to tensor is expected, alone or under "
            + ", ".join(map(repr, WEIGHT_KEYS)),
            nearest=f"It holds: {', '.join(list(content)[:5])[:200]}" if found else "",
            advice="Save it as torch.save(module.state_dict(), path)",
        )
    return tensors


def weight_key(path: Path, content: Mapping[str, Any], holds: Callable[[Any], bool]) -> str | None:
    """The key of the dict in `content` that holds the weights; None: `content` itself.

    `holds(value)`: whether a value contains tensors. Raises `UserError` for two such dicts.
    """
    inner = [key for key in WEIGHT_KEYS if holds(content.get(key))]
    if len(inner) > 1:
        raise UserError(
            f"{path} holds weights as {' and as '.join(map(repr, inner))}",
            rule="a file of weights holds one set of them",
            advice="Save the one you mean alone: torch.save(weights, path)",
        )
    return inner[0] if inner else None


def _has_tensors(content: Any, depth: int) -> bool:
    if not isinstance(content, dict) or not depth:
        return False
    return any(isinstance(value, _Tensor) for value in content.values()) or any(
        _has_tensors(content.get(key), depth - 1) for key in WEIGHT_KEYS
    )


def _keys(tensors: Mapping[str, _Tensor]) -> set[str]:
    return {tensor.storage.key for tensor in tensors.values()}


def _entry(path: Path, name: str, tensor: _Tensor, span: Span) -> Entry:
    item = ITEM_BYTES.get(tensor.dtype)
    if item is None:
        raise UserError(
            f"{path}: `{name}` has the dtype {tensor.dtype}",
            rule=f"these are read: {', '.join(_DTYPES)}",
            advice="Save it with one of them",
        )
    last = 0
    if math.prod(tensor.shape):
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        last = (tensor.offset + reach + 1) * item
    if last > span.length:
        raise broken(path, f"`{name}` ends at byte {last} of a storage of {span.length}")
    start = span.start + (tensor.offset * item if last else 0)
    stop = span.start + last if last else start
    return Entry(tensor.dtype, tensor.shape, start, stop, tensor.strides)


def _storage(identity: Any) -> _Storage:
    """The storage with a persistent id ("storage", class, key, device, length)."""
    kind, storage_class, key, *_ = identity
    if kind != "storage" or not isinstance(storage_class, Named) or not isinstance(key, str):
        raise ValueError("a persistent id is not that of a storage")
    name = storage_class.name.rpartition(".")[2].removesuffix("Storage")
    return _Storage(key, "" if name == "Untyped" else _STORAGES.get(name, name))


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: str, bits: Any = None
) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise ValueError("a tensor has no storage, or not one stride for each dim")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError("the shape, offset or strides of a tensor are not integers of 0 or more")
    if isinstance(bits, dict) and any(bits.values()):
        # Values are stored as they were before they were conjugated or negated.
        dtype = " ".join([dtype, *sorted(bits)])
    return _Tensor(storage, offset, tuple(shape), tuple(strides), dtype)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None,
    bits: Any = None,
) -> _Tensor:  # fmt: skip
    return _tensor(storage, offset, shape, strides, storage.dtype, bits)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any,
    bits: Any = None,
) -> _Tensor:  # fmt: skip
    name = dtype.name.removeprefix("torch.")
    return _tensor(storage, offset, shape, strides, _DTYPES.get(name, name), bits)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes; these are left out."""
    if kind.name not in _PLAIN_TYPES or function.name not in _TENSOR_CALLS:
        raise RefusedCallError(f"{function.name} for a {kind.name}")
    return _TENSOR_CALLS[function.name](*arguments)


def _no_tensor(*_: Any) -> None:
    """Values other than tensors are left out."""


def _map(items: Any = (), *_: Any) -> dict[str, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {key: value for key, value in pairs if isinstance(key, str)}


_TENSOR_CALLS: dict[str, Call] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}
_CALLS: dict[str, Call] = {
    **_TENSOR_CALLS,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "collections.OrderedDict": _map,
    "collections.defaultdict": lambda *_: {},
    **dict.fromkeys(_NO_TENSORS, _no_tensor),
}
"""The callables that a pickle of torch may name, and what is called in their place."""
