"""Interleaved chunks on CUDA: which stream the hooks of FSDP run on, and in which order.

Without a GPU: streams are fakes that record what is asked of them, FSDP and autograd are real. A
hook on a tensor runs on the stream on which the operation that made the tensor was called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from launcher.parallel import interleave as interleaving
from launcher.parallel import world as worlds
from tests.models.tiny import tokens
from tests.parallel.keeping import decoder, numbered, run_again
from tests.ranks import run_ranks

Event = tuple[str, ...]


class FakeStreams:
    """The streams of a device that executes at once: what was asked, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.main = FakeStream("main", self.events)
        self.sides = [FakeStream(f"side {i}", self.events) for i in range(2)]
        self.current = self.main

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class FakeStream:
    def __init__(self, name: str, events: list[Event]) -> None:
        self.name, self._events = name, events

    def wait_stream(self, other: FakeStream) -> None:
        self._events.append((self.name, "waits for", other.name))


def observed(recompute: bool, guarded: bool) -> tuple[list[Event], list[list[str]], list[Any]]:
    """A step of a sharded model: the events of the backward pass, the stream of every output of
    each layer, and the gradients. `guarded`: with the outputs taken to the main stream."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    worlds.start(force_cpu=True)
    streams = FakeStreams()
    events = streams.events
    torch.cuda.current_stream = lambda *_: streams.current  # type: ignore[assignment]
    torch.cuda.stream = streams.stream  # type: ignore[assignment]
    Tensor.record_stream = (  # type: ignore[assignment]
        lambda _, stream: events.append(("memory", "is used by", stream.name))
    )
    interleaving._Streams.of = lambda *_: streams.sides  # type: ignore[method-assign, assignment]

    def logged(owner: Any, name: str, text: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            events.append((text,))
            return function(*arguments, **keywords)

        is_static = isinstance(owner.__dict__[name], staticmethod)
        setattr(owner, name, staticmethod(call) if is_static else call)

    logged(FSDPState, "_pre_backward", "weights")
    logged(FSDPParamGroup, "post_backward", "gradients")
    logged(interleaving._StartBackward, "backward", "start")
    if not guarded:
        interleaving._StartBackward.apply = staticmethod(lambda *outputs: outputs)  # type: ignore

    model = decoder("dense")
    run_again(model, recompute=recompute)
    made: dict[Node, str] = {}
    for layer in numbered(model).values():
        layer.forward = _recorded(layer.forward, streams, made)
    interleaving.interleave(model, 2)
    mesh, layers = init_device_mesh("cpu", (1,)), numbered(model)
    where: list[list[str]] = []
    for layer in layers.values():
        layer.register_forward_hook(
            lambda _, __, outputs: where.append([made.get(t.grad_fn, "main") for t in outputs])
        )
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = tokens(2, 24)
    logits = model(ids, sample_seeds=torch.tensor([5, 6]))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1)[:-1], ids.flatten()[1:])
    events.clear()
    loss.backward()
    gradients = [p.grad.full_tensor().numpy() for p in model.parameters()]  # type: ignore[union-attr]
    return [e for e in events if e[0] != "memory"], where, gradients


def _recorded(forward: Any, streams: FakeStreams, made: dict[Node, str]) -> Any:
    """`forward` of one chunk, which records its stream for its output."""

    def run(states: Tensor, context: Any) -> Tensor:
        output: Tensor = forward(states, context)
        assert output.grad_fn is not None
        made[output.grad_fn] = name = streams.current.name
        output.register_hook(lambda _: streams.events.append((name,)))
        return output

    return run


OF_A_LAYER: Sequence[Event] = (
    *(("weights",), ("weights",), ("start",), ("side 1",), ("side 0",)),
    *(("main", "waits for", "side 0"), ("main", "waits for", "side 1"), ("gradients",)),
)


def test_weights_are_gathered_on_the_main_stream_before_any_chunk() -> None:
    [(events, where, gradients)] = run_ranks(1, observed, False, True)
    [(again, _, recomputed)] = run_ranks(1, observed, True, True)
    [(_, unguarded, same)] = run_ranks(1, observed, False, False)
    assert where == [["main", "main"]] * 3
    # what the test sees where the outputs stay on the streams of the chunks
    assert unguarded == [["side 0", "side 1"]] * 3
    assert all(map(np.array_equal, gradients, same))
    assert all(map(np.array_equal, gradients, recomputed))
    for found in (events, again):
        first = found.index(("weights",), 1)  # after the hook of the model itself
        assert tuple(found[first:][: 3 * len(OF_A_LAYER)]) == tuple(OF_A_LAYER) * 3
