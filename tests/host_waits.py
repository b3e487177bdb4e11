"""A mode in which reading from the device is an error, for tests on machines without one.

The tensors of a model stand for those on a device, and so does all that is computed from them: they
are told from tensors of the host by their memory. An operation whose result the host needs (a
value, or a size that depends on values) then fails outside of `host_read`. What it cannot see:
copies to a device that wait (`.to(device)` without `non_blocking`), and what kernels of a GPU do in
C++.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.host_reads import current_host_read

_TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
_SIZES_FROM_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class HostWait(AssertionError):
    """The host read from the device outside of `host_read`."""


class Marks:
    """The memory that stands for that of a device."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held: dict[int, StorageWeakRef] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = _plain(tensor).untyped_storage()
        self._held[storage._cdata] = StorageWeakRef(storage)

    def has(self, tensor: Tensor) -> bool:
        found = self._held.get(_plain(tensor).untyped_storage()._cdata)
        return found is not None and not found.expired()

    def any(self, values: Any) -> bool:
        return any(isinstance(leaf, Tensor) and self.has(leaf) for leaf in tree_leaves(values))


def _plain(tensor: Tensor) -> Tensor:
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


class _Operations(TorchDispatchMode):
    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = self.marks.any((args, kwargs))
        if on_device and _needs_values(op, args, kwargs) and current_host_read() is None:
            raise HostWait(f"{op} waits for the device")
        result = op(*args, **kwargs)
        if on_device:
            written = [
                kwargs.get(argument.name, args[at] if at < len(args) else None)
                for at, argument in enumerate(op._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for leaf in tree_leaves((result, written)):
                if isinstance(leaf, Tensor):
                    self.marks.add(leaf)
        return result


def _needs_values(op: Any, args: Any, kwargs: Any) -> bool:
    if kwargs.get("output_size") is not None:
        return False  # of repeat_interleave, which then knows its size
    if op is torch.ops.aten.index.Tensor or op is torch.ops.aten.index_put.default:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return bool(_SIZES_FROM_VALUES & set(op.tags))


class _Methods(TorchFunctionMode):
    """Methods that are not dispatched as operations."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _TO_HOST and self.marks.any(args[:1]) and current_host_read() is None:
            raise HostWait(f"Tensor.{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_waits(tensors: Iterable[Tensor]) -> Iterator[Marks]:
    """Raise `HostWait` at any read of `tensors`, and of what is computed from them."""
    marks = Marks(tensors)
    with _Methods(marks), _Operations(marks):
        yield marks
