"""Decoding steps that are recorded once and replayed: CUDA graphs.

A decoding step of a small batch is hundreds of short kernels, and launching them one by one takes
longer than running them. A graph launches all of them at once. Invariants: what is recorded reads
and writes the same memory in every step (the token ids, the column of the new token and the cache);
it is recorded again when the cache has grown or rows have left; scores are those of the steps that
are not recorded, up to the order of sums.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from launcher.generation.forward import Forward
from launcher.parallel.kernels import usual_writes
from models.cache import KVCache
from models.decoder import Decoder

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs a step and gives (what replays it, its output, which a replay overwrites). The step may be
run several times: it changes nothing but its output and the column of the new token."""

_WARM_UPS = 2
"""Steps before the recorded one, for what libraries allocate and choose in their first calls."""


def record_cuda(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A `Recorder` that captures a CUDA graph, as torch.cuda.graphs describes."""
    beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
    beside.wait_stream(current)
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UPS):
            step()
    current.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


def can_be_recorded(model: Decoder) -> bool:
    """Whether no operation of a step waits for the device or has sizes that depend on values:
    decoders without experts."""
    return model.config.experts is None


class GraphedForward(Forward):
    """The forward of a complete decoder, whose steps of one token are replayed."""

    def __init__(self, model: Decoder, recorder: Recorder = record_cuda) -> None:
        super().__init__(model)
        self.recorder = recorder
        self._recorded: tuple[object, ...] = ()
        self._ids = self._index = self._scores = torch.empty(0)
        self._replay: Callable[[], None] = lambda: None

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor | None:
        if ids.shape[1] != 1 or cache.length == 0:
            return super().__call__(ids, cache)
        cache.reserve(1)
        # A reference that keeps no memory; a dead one equals only itself.
        recorded = (weakref.ref(cache), len(ids), cache.storage())
        if recorded != self._recorded:
            self._record(ids, cache)
            self._recorded = recorded
        self._ids.copy_(ids)
        self._index.fill_(cache.length)
        self._replay()
        cache.advance(1)
        return self._scores[:, -1]

    def _record(self, ids: Tensor, cache: KVCache) -> None:
        self._ids = ids.clone()
        self._index = torch.full((1,), cache.length, device=ids.device)

        def step() -> Tensor:
            with usual_writes(), cache.recordable(self._index):
                scores: Tensor = self.model(self._ids, cache=cache, last_only=True)
            return scores

        self._replay, self._scores = self.recorder(step)
