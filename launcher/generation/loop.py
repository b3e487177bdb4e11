"""From prompt tokens to new tokens: the loop over steps.

Invariants: the continuation of a prompt does not depend on the other prompts of its batch (lengths,
penalties and random draws are per prompt); greedy continuations are those of `transformers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from launcher.generation.forward import Forward
from launcher.generation.module_generate import continue_with_transformers
from launcher.generation.sampling import Chooser
from launcher.generation.settings import GenerationSettings
from models.attention import KVCache
from models.transformers_model import TransformersModel


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
) -> list[list[int]]:
    """The new tokens of each prompt of one batch, with the end token where there is one.

    `model`: a complete model, or the forward of one that is spread over ranks, which then all call
    this together. `indices`: the indices of the prompts among all, for random draws. A module of
    transformers continues its prompts one by one, with its own `generate`; it must not be sharded.
    """
    forward = model if isinstance(model, Forward) else Forward(model)
    model = forward.model
    training = model.training
    model.eval()
    try:
        if isinstance(model, TransformersModel):
            return [
                continue_with_transformers(model, prompt, settings, limit, index, seed, device)
                for prompt, limit, index in zip(prompts, limits, indices, strict=True)
            ]
        return _continue_batch(forward, prompts, settings, limits, indices, seed, device)
    finally:
        model.train(training)


def _continue_batch(
    forward: Forward, prompts: Sequence[Sequence[int]], settings: GenerationSettings,
    limits: Sequence[int], indices: Sequence[int], seed: int, device: torch.device | str,
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
        Chooser(settings, prompt, index, seed, device)
        for prompt, index in zip(prompts, indices, strict=True)
    ]
    rooms = [limit - len(prompt) for prompt, limit in zip(prompts, limits, strict=True)]
    cache = KVCache(capacity=longest + max(rooms))
    running = list(range(len(prompts)))
    while True:
        scores = forward(ids, mask if padded else None, cache)
        next_ids = torch.full((len(prompts),), settings.pad_token_id, device=device)
        if scores is not None:
            for row in running:
                next_ids[row] = choosers[row].choose(scores[row : row + 1])
        next_ids = forward.share(next_ids)
        for row, token in enumerate(next_ids.tolist()):
            if row in running:
                choosers[row].append(token)
                if token in settings.eos_token_ids or len(choosers[row].tokens) >= limits[row]:
                    running.remove(row)
        if not running:
            break
        ids = next_ids[:, None]
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
    return [c.tokens[len(p) :] for c, p in zip(choosers, prompts, strict=True)]
