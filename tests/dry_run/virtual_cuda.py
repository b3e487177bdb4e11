"""A CUDA device on any machine: tensors of the CPU that say they are on `cuda`.

Owns the pretence. Tensors that are made for CUDA or moved there are marked; they answer `device`
and `is_cuda` as those of a GPU do, and the kernels of the CPU compute them, forward and backward.
What fails or waits on a GPU is an error here:

    an operation on tensors of both devices    (but for scalars, and copies)
    a value that the host reads                `.item()`, `.tolist()`, `bool(tensor)`, `.cpu()`, and
                                               operations whose result has a size that depends on
                                               values; allowed within `host_read`
    a copy that the host waits for             to the device without `non_blocking`, as that of
                                               `torch.tensor(values, device="cuda")`, and either way
                                               through memory that is not pinned, but for small ones
    an operation without a kernel for CUDA     by torch's own table of kernels
    one that is refused in deterministic mode  by torch's documentation, where the mode is on

It cannot see: the order of streams, whose calls do nothing; the insides of compiled graphs; NCCL,
in whose place is gloo; the numbers that a GPU computes. Threads that are started meanwhile have the
device too, and may wait for it.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.host_reads import current_host_read
from tests.dry_run.torch_tables import (
    STAND_INS,
    name_of,
    raises_when_deterministic,
    without_cuda,
)

DEVICE = torch.device("cuda", 0)
"""What every marked tensor says."""
_CPU = torch.device("cpu")
_COPIES = {"copy_", "_to_copy", "_foreach_copy_", "set_", "set_.source_Tensor"}
STAGED_BYTES = 64 << 10
"""What the driver takes from memory that is not pinned without waiting for the device: CUDA's
documentation, "API synchronization behavior"."""
_COPYING = {"copy_", "_foreach_copy_", "__setitem__"}
"""Calls from Python that copy between tensors that exist."""
_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}
"""Functions that copy values of the host."""
_READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_consecutive", "unique_dim", "bincount", "histc",
}  # fmt: skip
"""Operations after which the host knows values of the device."""


class DeviceError(RuntimeError):
    """Something that a GPU would not do, or that the host would wait for."""


class Marks:
    """The memory that is on the device."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        """Mark the memory of a tensor."""
        if (storage := _storage(tensor)) is not None:
            # The weak reference keeps the address from being used for another storage.
            self._storages[storage._cdata] = StorageWeakRef(storage)

    def __contains__(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._storages


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor; None where it has none."""
    with torch._C.DisableTorchFunction():
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.is_meta or local.layout != torch.strided:
            return None
        return local.untyped_storage()


@dataclass(frozen=True)
class _Call:
    """A call of torch from Python that is under way."""

    name: str
    asked: str | None
    """The type of the device it names; None: it names none."""
    on_device: bool
    """Whether a tensor among its arguments is marked."""


class _Thread(threading.local):
    """What is under way in one thread."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.is_strict = False
        """Whether the host must not read values now."""


class VirtualCuda:
    """As a context manager: this process has a GPU."""

    def __init__(self) -> None:
        self.marks = Marks()
        self.pinned = Marks()
        """Host memory that copies need not stage."""
        self.thread = _Thread()
        self.reads: list[str] = []
        """The reason of each value that the host read where that counts."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        run, modes = threading.Thread.run, self._modes

        def run_on_device(thread: threading.Thread) -> None:
            with modes():
                run(thread)

        hooks = torch.autograd.graph.saved_tensors_hooks
        begin, visible = hooks.__init__, self._visible_to

        def begin_visible(self: Any, pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
            begin(self, visible(pack), visible(unpack))

        self._stack.enter_context(patch.object(threading.Thread, "run", run_on_device))
        self._stack.enter_context(patch.object(hooks, "__init__", begin_visible))
        self._stack.enter_context(self._modes())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _visible_to(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that torch calls from within a call, where no mode is active."""

        @functools.wraps(hook)
        def called(*arguments: Any) -> Any:
            with _Functions(self):
                return hook(*arguments)

        return called

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with _Operations(self), _Functions(self):
            yield

    def strict(self, function: Callable[..., Any], after: int = 0) -> Callable[..., Any]:
        """`function`, in which the host must not read a value of the device, but for its first
        `after` calls."""
        calls = itertools.count()

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            before, self.thread.is_strict = self.thread.is_strict, next(calls) >= after
            try:
                return function(*arguments, **keywords)
            finally:
                self.thread.is_strict = before

        return checked

    def read(self, name: str) -> None:
        """The host reads a value by this operation. Raises DeviceError where it must not."""
        if not self.thread.is_strict:
            return
        if (reason := current_host_read()) is not None:
            self.reads.append(reason)
        else:
            raise DeviceError(f"{name}: the host waits for a value of the device")

    def has(self, value: object) -> bool:
        """Whether this is a tensor of the device."""
        return isinstance(value, Tensor) and value in self.marks

    def send(self, name: str, tensor: Tensor, *, non_blocking: bool) -> None:
        """A copy of a tensor of the host to the device. Raises DeviceError where the host must not
        wait for it."""
        if not non_blocking or self.is_staged(tensor):
            self.read(f"{name} of {list(tensor.shape)} to the device")

    def is_staged(self, tensor: Tensor) -> bool:
        """Whether a copy from or to this tensor of the host goes through other memory, which waits
        for the device."""
        return tensor not in self.pinned and tensor.nbytes > STAGED_BYTES

    def factory_is_on_device(self) -> bool:
        """Whether an operation without operands makes its result on the device. One that C++ calls
        makes it where its caller's operands are; the backward pass is on the device."""
        if not self.thread.calls:
            return False
        call = self.thread.calls[-1]
        return call.asked == "cuda" if call.asked is not None else call.on_device


class _Functions(TorchFunctionMode):
    """What Python calls: devices that are named or asked for."""

    def __init__(self, owner: VirtualCuda) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = self.owner
        if name == "__get__":
            return self._attribute(func, args)
        if func in _ANSWERS:
            return _ANSWERS[func](owner, *args, **kwargs)
        if func in _HOST:
            if args[0] in owner.marks:
                owner.read(f"Tensor.{name}")
            return func(*args, **kwargs)
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, name, args, kwargs)
        is_pinned, asked = bool(kwargs.pop("pin_memory", False)), None
        if (named := kwargs.get("device")) is not None:
            asked = _type_of(named)
            if asked == "cuda":
                kwargs["device"] = _CPU
        result = self._called(func, args, kwargs, asked)
        if is_pinned:
            for tensor in _tensors(result):
                owner.pinned.add(tensor)
        elif asked == "cuda" and func in _FROM_VALUES and not owner.has(args[0]):
            owner.send(name, result, non_blocking=False)
        return result

    def _called(self, func: Any, args: Sequence[Any], kwargs: Any, asked: str | None) -> Any:
        owner = self.owner
        on_device = any(t in owner.marks for t in _tensors((args, kwargs)))
        name = getattr(func, "__name__", "")
        owner.thread.calls.append(_Call(name, asked, on_device))
        try:
            if func is Tensor.backward:
                with self:  # Python code of autograd functions is called from there
                    return _backward(*args, **kwargs)
            result = func(*args, **kwargs)
        finally:
            owner.thread.calls.pop()
        if asked == "cuda":
            for tensor in _tensors(result):
                owner.marks.add(tensor)
        return result

    def _attribute(self, func: Any, args: Sequence[Any]) -> Any:
        of = getattr(func.__self__, "__name__", "")
        if of in ("device", "is_cuda", "is_cpu") and args[0] in self.owner.marks:
            return {"device": DEVICE, "is_cuda": True, "is_cpu": False}[of]
        return func(*args)

    def _moved(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`Tensor.to`, `.cuda()` and `.cpu()`."""
        tensor, marks, owner = args[0], self.owner.marks, self.owner
        rest = list(args[1:])
        queued = bool(kwargs.get("non_blocking", any(value is True for value in rest[:3])))
        if name in ("cuda", "cpu"):
            target, rest, kwargs = name, [], {}
        elif rest and isinstance(rest[0], Tensor):
            other = rest.pop(0)
            target = "cuda" if other in marks else other.device.type
            kwargs.setdefault("dtype", other.dtype)
        else:
            named = kwargs.pop("device", None)
            if named is None and rest and isinstance(rest[0], (torch.device, str, int)):
                named = rest.pop(0)
            target = None if named is None else _type_of(named)
        if target is None or target == "meta" or isinstance(tensor, DTensor):
            return self._called(func, (tensor, *rest), kwargs, target)
        here = "cuda" if tensor in marks else tensor.device.type
        if target == here:
            return self._called(Tensor.to, (tensor, _CPU, *rest), kwargs, target)
        if here == "cuda" and not queued:
            owner.read(f"Tensor.{name}")
        elif target == "cuda" and here == "cpu":
            owner.send(f"Tensor.{name}", tensor, non_blocking=queued)
        result = self._called(Tensor.to, (tensor, _CPU, *rest), {**kwargs, "copy": True}, target)
        if target == "cpu" and queued:  # torch pins the result
            owner.pinned.add(result)
        return result


class _Operations(TorchDispatchMode):
    """What kernels are given."""

    def __init__(self, owner: VirtualCuda) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        marks, name = self.owner.marks, name_of(func)
        given = [t for t in _tensors((args, kwargs)) if not t.is_meta]
        here = [t for t in given if t in marks]
        if here:
            self._check(func, name, args, kwargs, given)
            # Not those within other calls, as in gloo, which are none of NCCL.
            calls = self.owner.thread.calls
            if name in ("copy_", "_foreach_copy_") and calls and calls[-1].name in _COPYING:
                self._check_copies(name, args, kwargs)
        result = _STAND_INS.get(name, func)(*args, **kwargs)
        if self._is_on_device(name, given, here):
            for tensor in _tensors(result):
                marks.add(tensor)
        return result

    def _is_on_device(self, name: str, given: Sequence[Tensor], here: Sequence[Tensor]) -> bool:
        """Whether the results of an operation are on the device."""
        calls = self.owner.thread.calls
        if name == "_to_copy" and calls and calls[-1].asked is not None:
            return calls[-1].asked == "cuda"
        if name in ("copy_", "_foreach_copy_"):
            return False  # the target keeps its device
        if here and calls and calls[-1].asked == "cpu" and name.startswith(("new_", "empty_like")):
            return False
        return bool(here) or (not given and self.owner.factory_is_on_device())

    def _check(
        self, func: OpOverload, name: str, args: Sequence[Any], kwargs: Mapping[str, Any],
        given: Sequence[Tensor],
    ) -> None:  # fmt: skip
        marks = self.owner.marks
        if name.split(".")[0] not in _COPIES and name not in _COPIES:
            for tensor in given:
                if tensor not in marks and tensor.dim() and not _belongs_on_host(func, tensor):
                    raise DeviceError(f"{func}: a tensor {list(tensor.shape)} of the CPU among "
                                      "those of the device")  # fmt: skip
        unknown_size = name == "repeat_interleave.Tensor" and kwargs.get("output_size") is None
        if name in _READS or unknown_size or (name.startswith("index") and _has_mask(args)):
            self.owner.read(name)
        if name in without_cuda() and name not in STAND_INS:
            raise DeviceError(f"{func} has no kernel for CUDA")
        if torch.are_deterministic_algorithms_enabled() and raises_when_deterministic(name, args):
            raise DeviceError(f"{func} is refused in deterministic mode")

    def _check_copies(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        owner = self.owner
        queued = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        for target, source in zip(_tensors(args[0]), _tensors(args[1]), strict=True):
            if target not in owner.marks and source in owner.marks:
                if not queued or owner.is_staged(target):
                    owner.read(f"{name} to the host")
            elif target in owner.marks and source not in owner.marks:
                owner.send(name, source, non_blocking=queued)


def _belongs_on_host(func: OpOverload, tensor: Tensor) -> bool:
    """Whether an operator of our own reads a tensor on the host: the lengths of documents."""
    return func.namespace == "slipway" and tensor.dtype == torch.int32


def _has_mask(args: Sequence[Any]) -> bool:
    """Whether an indexing operation selects by a mask: the size of its result depends on values."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in indices)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _type_of(device: Any) -> str:
    return "cuda" if isinstance(device, int) else torch.device(device).type


def _backward(
    tensor: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None,
    create_graph: bool = False, inputs: Any = None,
) -> None:  # fmt: skip
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _pinned(owner: VirtualCuda, tensor: Tensor, *_: Any) -> Tensor:
    if tensor in owner.pinned:
        return tensor
    result = tensor.clone()
    owner.pinned.add(result)
    return result


def _product_added(
    total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor
) -> Tensor:
    return out.copy_(total + left.to(dtype) @ right.to(dtype))


_STAND_INS: dict[str, Callable[..., Any]] = {"addmm.dtype_out": _product_added}
"""For operations without a kernel for the CPU, by name."""
_HOST = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__}
"""Reads that are no operation."""
_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.pin_memory: _pinned,
    Tensor.is_pinned: lambda owner, tensor, *_: tensor in owner.pinned,
    Tensor.get_device: lambda owner, tensor: 0 if tensor in owner.marks else -1,
}
"""Calls that a GPU answers and a CPU cannot."""
