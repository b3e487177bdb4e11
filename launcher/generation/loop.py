"""From prompt tokens to new tokens: the loop over steps.

Invariants: the continuation of a prompt does not depend on the other prompts of its batch (lengths,
penalties and random draws are per prompt); greedy continuations are those of `transformers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from launcher.generation.forward import Forward
from launcher.generation.module_generate import continue_with_transformers
from launcher.generation.sampling import Chooser
from launcher.generation.settings import GenerationSettings
from launcher.generation.stopping import Stopping
from models.attention import KVCache
from models.transformers_model import TransformersModel

Watch = Callable[[Sequence[int | None]], bool]
"""Called after each step with the new token of each row (None: the row has ended before); returns
whether to stop. Ranks that step together must all return the same."""


@torch.no_grad()
def continue_tokens(
    model: nn.Module | Forward,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    limits: Sequence[int],
    indices: Sequence[int],
    seed: int,
    device: torch.device | str,
    watch: Watch | None = None,
    tokenizer: Any = None,
) -> list[list[int]]:
    """The new tokens of each prompt of one batch, with the end token where there is one.

    `model`: a complete model, or the forward of one that is spread over ranks, which then all call
    this together. `indices`: see `launcher.generation.draw`. A module of transformers continues its
    prompts one by one, with its own `generate`; it must not be sharded. `watch` sees every step and
    may stop; what there is then is returned. `tokenizer`: needed with `settings.stop_strings`.
    """
    forward = model if isinstance(model, Forward) else Forward(model)
    model = forward.model
    training = model.training
    model.eval()
    try:
        if isinstance(model, TransformersModel):
            return _continue_each(model, prompts, settings, limits, indices, seed, device, watch,
                                  tokenizer)  # fmt: skip
        stopping = Stopping(settings, tokenizer)
        return _continue_batch(forward, prompts, settings, limits, indices, seed, device, watch,
                               stopping)  # fmt: skip
    finally:
        model.train(training)


def _continue_each(
    model: TransformersModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings,
    limits: Sequence[int], indices: Sequence[int], seed: int, device: torch.device | str,
    watch: Watch | None, tokenizer: Any,
) -> list[list[int]]:  # fmt: skip
    """One prompt after the other; a stop leaves those behind it without new tokens."""
    news: list[list[int]] = [[] for _ in prompts]
    stopped = False

    def watch_row(row: int, token: int) -> bool:
        nonlocal stopped
        tokens = [token if other == row else None for other in range(len(prompts))]
        stopped = watch is not None and watch(tokens)
        return stopped

    for row, (prompt, limit, index) in enumerate(zip(prompts, limits, indices, strict=True)):
        news[row] = continue_with_transformers(
            model, prompt, settings, limit, index, seed, device,
            watch=None if watch is None else partial(watch_row, row), tokenizer=tokenizer,
        )  # fmt: skip
        if stopped:
            break
    return news


def _continue_batch(
    forward: Forward, prompts: Sequence[Sequence[int]], settings: GenerationSettings,
    limits: Sequence[int], indices: Sequence[int], seed: int, device: torch.device | str,
    watch: Watch | None, stopping: Stopping,
) -> list[list[int]]:  # fmt: skip
    """Prompts padded on the left, one token each a step, until every text has ended."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), settings.pad_token_id, device=device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = True
    padded = not bool(mask.all())
    choosers = [
        Chooser(settings, prompt, limit, index, seed, device)
        for prompt, limit, index in zip(prompts, limits, indices, strict=True)
    ]
    rooms = [limit - len(prompt) for prompt, limit in zip(prompts, limits, strict=True)]
    cache = KVCache(capacity=longest + max(rooms))
    running = list(range(len(prompts)))
    began = time.monotonic()
    while True:
        scores = forward(ids, mask if padded else None, cache)
        next_ids = torch.full((len(prompts),), settings.pad_token_id, device=device)
        if scores is not None:
            for row in running:
                next_ids[row] = choosers[row].choose(scores[row : row + 1])
        next_ids = forward.share(next_ids)
        tokens = next_ids.tolist()
        for row in running:
            choosers[row].append(tokens[row])
        stepped = [tokens[row] if row in running else None for row in range(len(prompts))]
        running = [
            row for row in running if not stopping.has_ended(choosers[row].tokens, limits[row])
        ]  # fmt: skip
        stopped = watch is not None and watch(stepped)
        if settings.max_time is not None:
            stopped = stopped or time.monotonic() - began > settings.max_time
        if watch is not None or settings.max_time is not None:
            stopped = forward.any(stopped)
        if stopped or not running:
            break
        ids = next_ids[:, None]
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
    return [c.tokens[len(p) :] for c, p in zip(choosers, prompts, strict=True)]
