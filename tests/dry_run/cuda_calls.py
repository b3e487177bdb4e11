"""The functions of `torch.cuda` on a machine without one: they answer, and do nothing."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # looks at the functions of `torch.cuda`, as they are, when it is imported
import torch._inductor.config
import torch.distributed as dist

DEVICES = 8
MEMORY = 80 << 30


class Stream:
    """In place of `torch.cuda.Stream`: everything is in order already."""

    def __init__(self, device: Any = None, priority: int = 0, **more: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    """In place of `torch.cuda.Event`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


_MAIN = Stream()


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield


def _nothing(*arguments: Any, **more: Any) -> None:
    pass


def _state(*arguments: Any) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


class _Runtime:
    """In place of `torch.cuda.cudart()`."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0


_PROPERTIES = types.SimpleNamespace(
    name="virtual GPU", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132
)
_CUDA: dict[str, Any] = {
    "is_available": lambda: True, "is_initialized": lambda: True,
    "init": _nothing, "_lazy_init": _nothing,
    "device_count": lambda: DEVICES, "current_device": lambda: 0, "set_device": _nothing,
    "get_device_name": lambda *_: _PROPERTIES.name, "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: _PROPERTIES, "is_bf16_supported": lambda *_: True,
    "synchronize": _nothing, "empty_cache": _nothing, "ipc_collect": _nothing,
    "Stream": Stream, "Event": Event, "stream": _stream, "current_stream": lambda *_: _MAIN,
    "default_stream": lambda *_: _MAIN, "cudart": _Runtime, "device": lambda *_: _stream(None),
    "mem_get_info": lambda *_: (MEMORY, MEMORY), "memory_allocated": lambda *_: 1 << 20,
    "max_memory_allocated": lambda *_: 1 << 20, "memory_reserved": lambda *_: 1 << 21,
    "max_memory_reserved": lambda *_: 1 << 21, "reset_peak_memory_stats": _nothing,
    "memory_stats": lambda *_: {}, "get_rng_state": _state, "set_rng_state": _nothing,
    "get_rng_state_all": list, "set_rng_state_all": _nothing,
    "manual_seed": _nothing, "manual_seed_all": _nothing, "_is_in_bad_fork": lambda: False,
}  # fmt: skip


def _gloo(init: Any) -> Any:
    def start(backend: Any = None, *arguments: Any, device_id: Any = None, **more: Any) -> Any:
        return init("gloo", *arguments, **more)

    return start


def _gloo_group(new: Any) -> Any:
    def create(*arguments: Any, backend: Any = None, device_id: Any = None, **more: Any) -> Any:
        more.pop("pg_options", None)
        return new(*arguments, backend="gloo", **more)

    return create


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """`torch.cuda` answers as with GPUs, and process groups for CUDA are those of gloo."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, create=True, **_CUDA))
        groups = {
            "init_process_group": _gloo(dist.init_process_group),
            "new_group": _gloo_group(dist.new_group),
        }
        stack.enter_context(patch.multiple(dist, **groups))
        # A mode that sees all calls is not active within one of them: `backward` is none.
        stack.enter_context(patch.object(torch.autograd, "has_torch_function", lambda _: False))
        # Its arguments are parsed before any mode sees them.
        stack.enter_context(patch.object(torch.Tensor, "record_stream", _nothing))
        yield
