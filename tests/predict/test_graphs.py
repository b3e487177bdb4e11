"""Recorded decoding steps, with a recorder for the CPU that works as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.generation.graphs import GraphedForward
from launcher.generation.settings import GenerationSettings
from models import cache as cache_module
from tests.models.tiny import GLM, dense_spec, pair
from tests.predict.test_generation import SAMPLED, run

FAMILIES: dict[str, dict[str, Any]] = {
    "window": {"type": "MistralConfig", "sliding_window": 6},
    "tied": {"type": "Qwen3Config", "head_dim": 16, "tie_word_embeddings": True},
    "dynamic": {
        "type": "LlamaConfig", "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "partly rotated pairs": GLM["glm"],
}  # fmt: skip


class Tape(TorchDispatchMode):
    """The operations of a step with the memory they work on. Numbers are what they were: an
    operation that depends on a number of Python would be wrong in a replay, as in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for func, args, kwargs, output in self.operations:
            olds = tensors_in(output)
            given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
            aliases = [t.untyped_storage().data_ptr() in given for t in olds]
            writes = func._schema.is_mutable
            if olds and all(aliases) and not writes:
                continue  # views of the same memory
            news = tensors_in(func(*args, **kwargs))
            for old, new, alias in zip(olds, news, aliases, strict=True):
                if not alias:
                    old.copy_(new)


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recorder:
    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        step()  # a warm-up changes nothing
        with Tape() as tape:
            output = step()

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, output


def forward_of(model: nn.Module) -> tuple[GraphedForward, Recorder]:
    recorder = Recorder()
    return GraphedForward(model, recorder), recorder  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_steps_give_the_tokens_of_the_others(name: str) -> None:
    own, _ = pair(dense_spec(**FAMILIES[name]))
    for settings in (GenerationSettings(max_new_tokens=12), SAMPLED):
        forward, recorder = forward_of(own)
        assert run(forward, settings) == run(own, settings)
        assert recorder.recorded == 1
        assert recorder.replayed == (settings.max_new_tokens or 0) - 1


def test_a_step_is_recorded_anew_when_memory_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.generation import loop

    monkeypatch.setattr(cache_module, "BLOCK", 4)
    monkeypatch.setattr(loop, "BLOCK", 4)
    own, _ = pair(dense_spec(**FAMILIES["tied"]))
    settings = GenerationSettings(max_new_tokens=16)
    free = run(own, settings)
    settings = GenerationSettings(max_new_tokens=16, eos_token_ids=(free[0][2], free[1][3]))
    forward, recorder = forward_of(own)
    assert run(forward, settings) == run(own, settings)
    assert 1 < recorder.recorded < recorder.replayed


def test_one_forward_continues_several_batches() -> None:
    own, _ = pair(dense_spec(**FAMILIES["tied"]))
    settings = GenerationSettings(max_new_tokens=6)
    forward, recorder = forward_of(own)
    assert run(forward, settings, batch_size=2) == run(own, settings)
    assert recorder.recorded == 2
