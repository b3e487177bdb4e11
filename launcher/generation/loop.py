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
from torch import Tensor, nn

from launcher.generation.forward import Forward
from launcher.generation.module_generate import continue_with_transformers
from launcher.generation.prefix import PrefixCache
from launcher.generation.sampling import Chooser
from launcher.generation.settings import GenerationSettings
from launcher.generation.stopping import Stopping
from launcher.host_reads import host_read
from models.cache import BLOCK, KVCache
from models.transformers_model import TransformersModel

Watch = Callable[[Sequence[int | None]], bool]
"""Called after each step with the new token of each row (None: the row has ended before); returns
whether to stop. Ranks that step together must all return the same."""


@torch.inference_mode()
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
    prefix: PrefixCache | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt of one batch, with the end token where there is one.

    `model`: a complete model, or the forward of one that is spread over ranks, which then all call
    this together. `indices`: see `launcher.generation.draw`. A module of transformers continues its
    prompts one by one, with its own `generate`; it must not be sharded. `watch` sees every step and
    may stop; what there is then is returned. `tokenizer`: needed with `settings.stop_strings`.
    `prefix`: keys and values of an earlier text, of which a single prompt takes those of its
    beginning, and to which it adds.
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
        return _continue_batch(
            forward, prompts, settings, limits, indices, seed, device, watch, stopping,
            prefix if prefix is not None and prefix.fits(model) else None,
        )  # fmt: skip
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
    watch: Watch | None, stopping: Stopping, prefix: PrefixCache | None,
) -> list[list[int]]:  # fmt: skip
    """Prompts padded on the left, one token each a step, until every text has ended."""
    if prefix is not None:
        (prompt,), (limit,) = prompts, limits
        cache = prefix.begin(prompt, limit)
        ids = torch.tensor([list(prompt[prefix.reused :])], device=device)
    else:
        ids, cache = _padded(prompts, limits, settings.pad_token_id, device)
    chooser = Chooser(settings, prompts, limits, indices, seed, device)
    began = time.monotonic()
    running = list(range(len(prompts)))
    """The prompts whose texts have not ended."""
    rows = running
    """The prompts of the rows of the cache."""
    while True:
        scores = forward(ids, cache)
        next_ids = torch.full((len(rows),), settings.pad_token_id, device=device)
        if scores is not None:
            next_ids = chooser.choose(scores, rows)
        next_ids = forward.share(next_ids)
        with host_read("tokens"):
            tokens = dict(zip(rows, next_ids.tolist(), strict=True))
        for row in running:
            chooser.append(row, tokens[row])
        stepped = [tokens[row] if row in running else None for row in range(len(prompts))]
        running = [
            row for row in running if not stopping.has_ended(chooser.tokens[row], limits[row])
        ]  # fmt: skip
        stopped = watch is not None and watch(stepped)
        if settings.max_time is not None:
            stopped = stopped or time.monotonic() - began > settings.max_time
        if watch is not None or settings.max_time is not None:
            stopped = forward.any(stopped)
        if stopped or not running:
            news = chooser.news()
            if prefix is not None:
                prefix.end([*prompts[0], *news[0]])
            return news
        if len(running) <= len(rows) // 2:
            kept = torch.tensor([rows.index(row) for row in running], device=device)
            cache.keep(kept)
            rows, next_ids = running, next_ids[kept]
        ids = next_ids[:, None]


def _padded(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], pad: int, device: torch.device | str
) -> tuple[Tensor, KVCache]:
    """The ids of `prompts` [rows, longest], padded on the left, and a cache for their texts."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    short = [longest - len(prompt) for prompt in prompts]
    padding = torch.tensor(short, device=device) if any(short) else None
    room = max(limit - len(prompt) for prompt, limit in zip(prompts, limits, strict=True))
    limit = longest + room
    capacity = min(limit, longest + BLOCK)
    return ids, KVCache(capacity, limit=limit, padding=padding, padding_counts=short)
