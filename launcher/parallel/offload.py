"""Activation offload: tensors saved for the backward pass are moved to host memory in between.

A `LayerOffload` has the saved tensors of one call of one module. They move as storages, each once,
however many views of it are saved. Parameters stay (they are needed anyway), and so do the rotary
tables, masks and indices that all layers share. On CUDA, copies use two streams and pinned memory;
the first use in the backward pass also prefetches the storages of the `backward_prefetch` layers
before. On the CPU everything is in host memory, and follows the same path without copies.
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
from launcher.parallel.layer_modules import (
    Function,
    check_patterns,
    is_inside,
    layer_modules,
    matching,
    outermost,
)
from launcher.parallel.local import local
from launcher.streams import Streams, streams_for
from models.attention import StepContext

MINIMUM_BYTES = 1024
"""Smaller tensors stay on the device."""


def check_offload(section: SwapSection, names: Collection[str], where: Callable[[str], str]) -> str:
    """Patterns of the configuration without effect on a model with these modules; may be empty.

    `where`: from a key to file and line. Raises UserError for a pattern that matches no module.
    """
    patterns = [pattern for entry in section.op_swap or () for pattern in _names(entry)]
    return ", ".join(check_patterns("swap_config.op_swap", patterns, names, where))


def offloaded_parts(
    layers: Mapping[int, nn.Module], section: SwapSection, recomputed: Mapping[int, Collection[str]]
) -> dict[int, dict[str, int]]:
    """The modules of each layer whose saved tensors are offloaded: name -> layers of prefetch.

    `recomputed`: the modules that are recomputed. Their inputs can be offloaded; modules inside of
    them save nothing.
    """
    result = {}
    for number, layer in layers.items():
        chosen = _chosen(section, number, layer_modules(layer)) if section.swap else {}
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
    """Offload the saved tensors of the `chosen` modules of `layers`."""
    swap = Swap(copy_engine_for(device))
    for number, layer in layers.items():
        found = layer_modules(layer)
        for name, prefetch in chosen[number].items():
            found[name].wrap(partial(swap.moving, owner=layer, number=number, prefetch=prefetch))
    return swap


def optimizer_policy(device: torch.device) -> OffloadPolicy | None:
    """FSDP's policy for optimizer state in host memory: parameters are there too, and are copied to
    the device for use. None on the CPU."""
    return CPUOffloadPolicy() if device.type == "cuda" else None


def _chosen(section: SwapSection, layer: int, names: Collection[str]) -> dict[str, int]:
    """The modules of a layer to offload, and how many layers ahead they are prefetched."""
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
    """The offloaded tensors of one model (or stage), and its copy engine."""

    def __init__(self, copy_engine: CopyEngine) -> None:
        self.copy_engine = copy_engine
        self.moved_bytes = 0
        """Total so far."""
        self._latest: weakref.ref[LayerOffload] | None = None

    def moving(self, function: Function, owner: nn.Module, number: int, prefetch: int) -> Function:
        """`function`, of the layer `owner` with this number, with its saved tensors offloaded."""

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
        """The previous offload in the same forward pass, for layer `number`."""
        latest = _alive(self._latest)
        return self._latest if latest is not None and latest.number <= number else None


def _alive(reference: weakref.ref[LayerOffload] | None) -> LayerOffload | None:
    return None if reference is None else reference()


def _tables(values: Iterable[Any]) -> list[Tensor]:
    return [t for value in values if isinstance(value, StepContext) for t in (value.cos, value.sin)]


class LayerOffload:
    """The saved tensors of one call of one module."""

    def __init__(
        self, swap: Swap, owner: nn.Module, tables: Iterable[Tensor], number: int, prefetch: int,
        before: weakref.ref[LayerOffload] | None,
    ) -> None:  # fmt: skip
        self.number = number
        self._swap, self._owner, self._prefetch, self._before = swap, owner, prefetch, before
        self._tables = {StorageWeakRef(table.untyped_storage()) for table in tables}
        self._storages: dict[StorageWeakRef, OffloadedStorage] = {}

    def pack(self, tensor: Tensor) -> OffloadedTensor | Tensor:
        """The handle that is saved for the backward pass; `tensor` itself if it stays."""
        if not tensor.is_floating_point() or isinstance(tensor, DTensor):
            return tensor
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in self._storages:
            if storage.nbytes() < MINIMUM_BYTES or key in self._tables or self._is_weight(key):
                return tensor
            self._storages[key] = OffloadedStorage(self._swap.copy_engine, storage)
            self._swap.moved_bytes += storage.nbytes()
        self._storages[key].references += 1
        offset = int(tensor.storage_offset())
        return OffloadedTensor(self, key, tensor.dtype, offset, tensor.shape, tensor.stride())

    def unpack(self, kept: OffloadedTensor) -> Tensor:
        """The tensor again, on the device."""
        self._fetch()
        storage = self._storages[kept.key].take()
        view = torch.empty(0, dtype=kept.dtype, device=storage.device)
        return view.set_(storage, kept.offset, kept.shape, kept.stride)

    def _fetch(self) -> None:
        """Start copying all of it back, and the layers before it."""
        layer_offload: LayerOffload | None = self
        for _ in range(1 + self._prefetch):
            if layer_offload is None:
                return
            for storage in layer_offload._storages.values():
                storage.prefetch()
            layer_offload = _alive(layer_offload._before)

    def _is_weight(self, key: StorageWeakRef) -> bool:
        # Looked up each time: FSDP gathers the weights of experts after the layer has begun.
        held = (local(p) for p in self._owner.parameters())
        return any(key == StorageWeakRef(p.untyped_storage()) for p in held)


@dataclass(frozen=True)
class OffloadedTensor:
    """One saved tensor: a view of an offloaded storage."""

    layer_offload: LayerOffload
    key: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _unpack(kept: OffloadedTensor | Tensor) -> Tensor:
    return kept.layer_offload.unpack(kept) if isinstance(kept, OffloadedTensor) else kept


class OffloadedStorage:
    """One storage on the host, and on the device from its prefetch to its last use."""

    def __init__(self, copy_engine: CopyEngine, storage: torch.UntypedStorage) -> None:
        self.references = 0
        """Saved tensors in it that have not been used."""
        self._copy_engine, self._host = copy_engine, copy_engine.out(storage)
        self._arriving: Any = None

    def prefetch(self) -> None:
        """Start the copy to the device, if it is needed and not already started."""
        if self._arriving is None and self.references > 0:
            self._arriving = self._copy_engine.back(self._host)

    def take(self) -> torch.UntypedStorage:
        """The storage on the device."""
        arriving = self._arriving or self._copy_engine.back(self._host)
        self.references -= 1
        self._arriving = arriving if self.references > 0 else None
        return self._copy_engine.arrived(arriving)


class CopyEngine:
    """Copies storages to the host and back. On the CPU nothing is copied."""

    def out(self, storage: torch.UntypedStorage) -> Any:
        """Start the copy to the host; returns the argument of `back`."""
        return storage

    def back(self, host: Any) -> Any:
        """Start the copy to the device; returns the argument of `arrived`."""
        return host

    def arrived(self, arriving: Any) -> torch.UntypedStorage:
        """The storage, ready for the current stream."""
        return arriving


class DeviceCopyEngine(CopyEngine):
    """Copies that overlap with computation, on one stream each way, through pinned memory, which
    the allocator of torch keeps for the next step."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self._device, self._streams = device, streams
        self._out, self._back = streams.new_stream(), streams.new_stream()

    def out(self, storage: torch.UntypedStorage) -> Any:
        there = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        host = self._streams.pinned(there.numel())
        self._streams.wait_for_current(self._out)  # which computes it
        with self._streams.use(self._out):
            host.copy_(there, non_blocking=True)
        self._streams.record_use(there, self._out)
        return host, self._streams.record_event(self._out)

    def back(self, host: Any) -> Any:
        memory, sent = host
        with self._streams.use(self._back):
            self._streams.current_waits(sent)
            there = torch.empty(memory.shape, dtype=torch.uint8, device=self._device)
            there.copy_(memory, non_blocking=True)
        return there, self._streams.record_event(self._back)

    def arrived(self, arriving: Any) -> torch.UntypedStorage:
        there, event = arriving
        self._streams.current_waits(event)
        self._streams.record_use(there, None)
        return there.untyped_storage()


def copy_engine_for(device: torch.device) -> CopyEngine:
    """The copy engine for this device."""
    streams = streams_for(device)
    return DeviceCopyEngine(device, streams) if streams.is_device else CopyEngine()
