"""Every step of a generation is seen, and a generation stops when its watcher says so."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from launcher.generation.loop import Watch, continue_tokens
from launcher.generation.settings import GenerationSettings
from models.build import build_model
from models.spec import ModelSpec
from tests.models.tiny import LLAMA, dense_spec, module_spec, oracle, pair

PROMPTS = [[5, 9, 33, 40], [7, 8], [50, 51, 52]]
NEW = 6


def built(name: str) -> nn.Module:
    spec = dense_spec(**LLAMA) if name == "decoder" else module_spec("gpt2")
    return pair(spec)[0] if spec.decoder else module_of(spec)


def module_of(spec: ModelSpec) -> nn.Module:
    model = build_model(spec, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.load_state_dict(oracle(spec).state_dict())
    return model


def run(model: nn.Module, watch: Watch | None, ends: tuple[int, ...] = ()) -> list[list[int]]:
    settings = GenerationSettings(max_new_tokens=NEW, eos_token_ids=ends)
    return continue_tokens(
        model, PROMPTS, settings, limits=[len(p) + NEW for p in PROMPTS], indices=range(3), seed=0,
        device="cpu", watch=watch,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["decoder", "module"])
def test_each_step_is_seen_and_rows_that_have_ended_have_none(name: str) -> None:
    model, steps = built(name), list[list[int | None]]()

    def watch(tokens: Sequence[int | None]) -> bool:
        steps.append(list(tokens))
        return False

    free = run(model, None)
    news = run(model, watch, ends=(free[1][2],))
    seen = [[step[row] for step in steps if step[row] is not None] for row in range(3)]
    assert seen == news
    assert len(news[1]) <= 3
    ended = steps[len(news[1]) :] if name == "decoder" else []
    assert all(step[1] is None for step in ended)


@pytest.mark.parametrize("name", ["decoder", "module"])
def test_a_watcher_stops_the_generation_and_what_there_is_remains(name: str) -> None:
    model, steps = built(name), list[Sequence[int | None]]()

    def watch(tokens: Sequence[int | None]) -> bool:
        steps.append(tokens)
        return len(steps) == 2

    free, news = run(model, None), run(model, watch)
    assert len(steps) == 2
    rows = 3 if name == "decoder" else 1  # a module of transformers takes one row after another
    assert news == [tokens[:2] for tokens in free[:rows]] + [[] for _ in free[rows:]]
