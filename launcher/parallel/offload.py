"""What layers keep for the backward pass, moved to host memory in between.

Owns the way there and back. A *parcel* is what one run of one piece keeps; it moves by storages,
each once, however many views of it are kept. Parameters stay (they are needed anyway), and so do
the tables of the rotation, masks and indices, which the layers share. On CUDA copies run on streams
of their own, out of and into pinned memory; the first use of a parcel in the backward pass also
sends for those of the layers before it, as many as `backward_prefetch` says. On the CPU everything
is in host memory already, and takes the same way without being copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from launcher.config.schema.parallel import SwapSection
from launcher.parallel.local import local
from launcher.parallel.pieces import (
    Function,
    check_patterns,
    is_inside,
    matching,
    outermost,
    pieces,
)
from models.attention import StepContext

SMALLEST = 1024
"""Bytes: what is smaller stays."""


def check_offload(section: SwapSection, names: Collection[str], where: Callable[[str], str]) -> str:
    """What of the configuration has no effect on a model with these pieces, empty for nothing.
    `where`: from a key to file and line.

    Raises UserError for a name that names no piece.
    """
    patterns = [pattern for entry in section.op_swap or () for pattern in _names(entry)]
    return ", ".join(check_patterns("swap_config.op_swap", patterns, names, where))


def offloaded_parts(
    layers: Mapping[int, nn.Module], section: SwapSection, recomputed: Mapping[int, Collection[str]]
) -> dict[int, dict[str, int]]:
    """The pieces of each layer, by number, that move what they keep: name -> how many layers ahead
    it comes back.

    `recomputed`: the pieces that run again. What they keep moves; what is inside of them keeps
    nothing that could.
    """
    result = {}
    for number, layer in layers.items():
        chosen = _chosen(section, number, pieces(layer)) if section.swap else {}
        again = recomputed[number]
        result[number] = {
            name: chosen[name]
            for name in outermost(chosen)
            if not any(is_inside(name, other) for other in again)
        }
    return result


def apply_offload(
    layers: Mapping[int, nn.Module], chosen: Mapping[int, Mapping[str, int]], device: torch.device
) -> Swap:
    """Let the `chosen` pieces of `layers` move what they keep to the host."""
    swap = Swap(copy_engine_for(device))
    for number, layer in layers.items():
        found = pieces(layer)
        for name, prefetch in chosen[number].items():
            found[name].wrap(partial(swap.moving, owner=layer, number=number, prefetch=prefetch))
    return swap


def optimizer_policy(device: torch.device) -> OffloadPolicy | None:
    """FSDP's policy for optimizer state in host memory: parameters live there and visit the device.
    None where host memory is all there is."""
    return CPUOffloadPolicy() if device.type == "cuda" else None


def _chosen(section: SwapSection, layer: int, names: Collection[str]) -> dict[str, int]:
    """The pieces of a layer to be moved, and how many layers ahead they come back."""
    if section.layer_swap is None and section.op_swap is None:
        return {"": 1}
    chosen: dict[str, int] = {}
    for entry in section.layer_swap or ():
        if _has(entry, layer):
            chosen.setdefault("", _prefetch(entry))
    for entry in section.op_swap or ():
        if _has(entry, layer):
            for name in sorted(set().union(*(matching(p, names) for p in _names(entry)))):
                chosen.setdefault(name, _prefetch(entry))
    return chosen


def _has(entry: Mapping[str, Any], layer: int) -> bool:
    layers = entry.get("layers", True)
    return layers if isinstance(layers, bool) else layer in layers


def _names(entry: Mapping[str, Any]) -> list[str]:
    names = entry["op_name"]
    return names if isinstance(names, list) else [names]


def _prefetch(entry: Mapping[str, Any]) -> int:
    written = entry.get("backward_prefetch", 1)
    return written if isinstance(written, int) else 1  # "Auto"


class Swap:
    """The parcels of one model (or stage), and what carries them."""

    def __init__(self, copy_engine: CopyEngine) -> None:
        self.copy_engine = copy_engine
        self.moved_bytes = 0
        """Of all parcels so far."""
        self._latest: weakref.ref[LayerOffload] | None = None

    def moving(self, function: Function, owner: nn.Module, number: int, prefetch: int) -> Function:
        """`function`, in the layer `owner` with this number, with what it keeps moved."""

        @wraps(function)
        def moved(*arguments: Any, **keywords: Any) -> Any:
            if not torch.is_grad_enabled():
                return function(*arguments, **keywords)
            tables = _tables((*arguments, *keywords.values()))
            layer_offload = LayerOffload(
                self, owner, tables, number, prefetch, self._before(number)
            )
            self._latest = weakref.ref(layer_offload)
            with saved_tensors_hooks(layer_offload.pack, _unpack):
                return function(*arguments, **keywords)

        return moved

    def _before(self, number: int) -> weakref.ref[LayerOffload] | None:
        """The parcel before one of the layer `number` in the same forward pass."""
        latest = _alive(self._latest)
        return self._latest if latest is not None and latest.number <= number else None


def _alive(reference: weakref.ref[LayerOffload] | None) -> LayerOffload | None:
    return None if reference is None else reference()


def _tables(values: Iterable[Any]) -> list[Tensor]:
    return [t for value in values if isinstance(value, StepContext) for t in (value.cos, value.sin)]


class LayerOffload:
    """What one run of one piece keeps."""

    def __init__(
        self, swap: Swap, owner: nn.Module, tables: Iterable[Tensor], number: int, prefetch: int,
        before: weakref.ref[LayerOffload] | None,
    ) -> None:  # fmt: skip
        self.number = number
        self._swap, self._owner, self._prefetch, self._before = swap, owner, prefetch, before
        self._tables = {StorageWeakRef(table.untyped_storage()) for table in tables}
        self._storages: dict[StorageWeakRef, OffloadedStorage] = {}

    def pack(self, tensor: Tensor) -> OffloadedTensor | Tensor:
        """What stands for `tensor` until it is needed."""
        if not tensor.is_floating_point() or isinstance(tensor, DTensor):
            return tensor
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in self._storages:
            if storage.nbytes() < SMALLEST or key in self._tables or self._is_weight(key):
                return tensor
            self._storages[key] = OffloadedStorage(self._swap.copy_engine, storage)
            self._swap.moved_bytes += storage.nbytes()
        self._storages[key].wanted += 1
        return OffloadedTensor(
            self, key, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def unpack(self, kept: OffloadedTensor) -> Tensor:
        """The tensor again, on the device."""
        self._fetch()
        storage = self._storages[kept.key].take()
        view = torch.empty(0, dtype=kept.dtype, device=storage.device)
        return view.set_(storage, kept.offset, kept.shape, kept.stride)

    def _fetch(self) -> None:
        """Send for all of it, and for the parcels before it."""
        layer_offload: LayerOffload | None = self
        for _ in range(1 + self._prefetch):
            if layer_offload is None:
                return
            for trunk in layer_offload._storages.values():
                trunk.send_for()
            layer_offload = _alive(layer_offload._before)

    def _is_weight(self, key: StorageWeakRef) -> bool:
        # Looked up each time: experts gather their weights after the layer has begun.
        held = (local(p) for p in self._owner.parameters())
        return any(key == StorageWeakRef(p.untyped_storage()) for p in held)


@dataclass(frozen=True)
class OffloadedTensor:
    """One kept tensor: which part of which storage of the parcel."""

    layer_offload: LayerOffload
    key: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _unpack(kept: OffloadedTensor | Tensor) -> Tensor:
    return kept.layer_offload.unpack(kept) if isinstance(kept, OffloadedTensor) else kept


class OffloadedStorage:
    """One storage: on the host, on its way back, or there until the last tensor in it is taken."""

    def __init__(self, copy_engine: CopyEngine, storage: torch.UntypedStorage) -> None:
        self.wanted = 0
        """Kept tensors in it that have not been taken."""
        self._copy_engine, self._host = copy_engine, copy_engine.out(storage)
        self._arriving: Any = None

    def send_for(self) -> None:
        """Let it come back, unless it is on its way, or nobody wants it any more."""
        if self._arriving is None and self.wanted > 0:
            self._arriving = self._copy_engine.back(self._host)

    def take(self) -> torch.UntypedStorage:
        """The storage on the device."""
        arriving = self._arriving or self._copy_engine.back(self._host)
        self.wanted -= 1
        self._arriving = arriving if self.wanted > 0 else None
        return self._copy_engine.arrived(arriving)


class CopyEngine:
    """Carries storages to the host and back. On the CPU they are there: nothing is copied."""

    def out(self, storage: torch.UntypedStorage) -> Any:
        """To the host: what `back` takes."""
        return storage

    def back(self, host: Any) -> Any:
        """Begin to bring it back: what `arrived` takes."""
        return host

    def arrived(self, arriving: Any) -> torch.UntypedStorage:
        """The storage, which the current stream may use."""
        return arriving


class CudaCopyEngine(CopyEngine):
    """Copies beside the computation, one stream each way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def out(self, storage: torch.UntypedStorage) -> Any:
        there = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        host = torch.empty(there.shape, dtype=torch.uint8, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            host.copy_(there, non_blocking=True)
            sent = self._out.record_event()
        there.record_stream(self._out)
        return host, sent

    def back(self, host: Any) -> Any:
        memory, sent = host
        with torch.cuda.stream(self._back):
            self._back.wait_event(sent)
            there = torch.empty(memory.shape, dtype=torch.uint8, device=self._device)
            there.copy_(memory, non_blocking=True)
            return there, self._back.record_event()

    def arrived(self, arriving: Any) -> torch.UntypedStorage:
        there, event = arriving
        current = torch.cuda.current_stream()
        current.wait_event(event)
        there.record_stream(current)
        return there.untyped_storage()


def copy_engine_for(device: torch.device) -> CopyEngine:
    """What carries storages of this device."""
    return CudaCopyEngine(device) if device.type == "cuda" else CopyEngine()
