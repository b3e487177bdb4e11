"""From prompts to text, over the replicas of the model.

Each replica (of one rank, or the tensor- and pipeline-parallel ranks of one copy of the model)
continues its share of the prompts: replica r of n has the prompts r, r + n, r + 2n, ...; rank 0
gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from launcher.generation.draw import FURTHER
from launcher.generation.forward import Forward
from launcher.generation.loop import continue_tokens
from launcher.generation.settings import GenerationSettings, token_limits
from models.decoder import Decoder
from models.positions import position_limit, stretched
from models.transformers_model import TransformersModel

Gather = Callable[[list[tuple[int, "Generation"]]], list[list[tuple[int, "Generation"]]] | None]
"""Collects one list a rank on rank 0; None elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt with its continuation."""

    prompt: str
    text: str
    """The prompt and its continuation."""
    tokens: tuple[int, ...]
    """The new tokens, with the end token where there is one."""


def generate(
    model: nn.Module | Forward,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
    rank: int = 0,
    data_parallel: int = 1,
    gather: Gather | None = None,
) -> list[Generation]:
    """Continue every prompt; in the order of the prompts on rank 0, empty on the others.

    A prompt has `settings.num_return_sequences` texts, one after the other. With `data_parallel` > 1
    replica `rank` continues its share, and `gather` collects them. Raises UserError for a prompt
    that is too long, before anything is computed.
    """
    forward = model if isinstance(model, Forward) else Forward(model)
    encoded = [_encode(tokenizer, prompt, settings) for prompt in prompts]
    limits = token_limits([len(ids) for ids in encoded], settings, positions_of(forward.model))
    copies = settings.num_return_sequences
    mine = range(rank, len(prompts) * copies, data_parallel)
    done: list[tuple[int, Generation]] = []
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        of = [text // copies for text in batch]
        news = continue_tokens(
            forward, [encoded[i] for i in of], settings, limits=[limits[i] for i in of],
            indices=[i + text % copies * FURTHER for i, text in zip(of, batch, strict=True)],
            seed=seed, device=device, tokenizer=tokenizer,
        )  # fmt: skip
        for index, i, new in zip(batch, of, news, strict=True):
            text = continued_text(tokenizer, prompts[i], encoded[i], new)
            done.append((index, Generation(prompt=prompts[i], text=text, tokens=tuple(new))))
    forward.finish()
    if data_parallel > 1 and gather is not None:
        shares = gather(done)
        done = [pair for share in shares or [] for pair in share]
    return [generation for _, generation in sorted(done, key=lambda pair: pair[0])]


def continued_text(
    tokenizer: Any, prompt: str, prompt_ids: Sequence[int], new: Sequence[int]
) -> str:
    """The prompt as given, followed by the decoded continuation."""
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    text = tokenizer.decode([*prompt_ids, *new], skip_special_tokens=True)
    if text.startswith(before):
        return prompt + text[len(before) :]
    return prompt + tokenizer.decode(list(new), skip_special_tokens=True)


def positions_of(model: nn.Module) -> int | None:
    """Tokens of the longest possible text; None: no limit."""
    if isinstance(model, Decoder):
        config = model.config
        return stretched(config.max_position_embeddings, config.rope_scaling or {})
    if not isinstance(model, TransformersModel):
        return None
    limit = position_limit(model.family, cast(Any, model.wrapped.config).to_dict())
    return limit.longest_row if limit is not None else None


def _encode(tokenizer: Any, prompt: str, settings: GenerationSettings) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids and settings.bos_token_id is not None:
        return [settings.bos_token_id]
    return ids
