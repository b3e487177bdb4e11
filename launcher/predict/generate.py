"""From prompts to text, over the replicas of the model.

Each replica (of one rank, or the tensor- and pipeline-parallel ranks of one copy of the model)
continues its share of the prompts: replica r of n has the prompts r, r + n, r + 2n, ...; rank 0
gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from launcher.data.conversations import Conversation
from launcher.generation.draw import FURTHER
from launcher.generation.forward import Forward
from launcher.generation.loop import Watch, continue_tokens
from launcher.generation.prefix import PrefixCache
from launcher.generation.settings import GenerationSettings, token_limits
from launcher.predict.encode import EncodedPrompt
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
    conversation: Conversation | None = None
    """Of a prompt that was rendered: its turns, the answer the last of them."""


def generate(
    model: nn.Module | Forward,
    tokenizer: Any,
    prompts: Sequence[str | EncodedPrompt],
    settings: GenerationSettings,
    *,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
    rank: int = 0,
    data_parallel: int = 1,
    gather: Gather | None = None,
    room: int | None = None,
    numbers: Sequence[int] | None = None,
    watch: Watch | None = None,
    prefix: PrefixCache | None = None,
) -> list[Generation]:
    """Continue every prompt; in the order of the prompts on rank 0, empty on the others.

    A prompt has `settings.num_return_sequences` texts, one after the other. With several replicas
    (`data_parallel`) replica `rank` continues its share, and `gather` collects them. Raises
    UserError for a prompt that is too long, before anything is computed. `room`: new tokens of a
    prompt, fewer where the model has no positions for them, in place of the lengths of `settings`.
    `numbers`: of the prompts among all of the prediction, which draws depend on; None: 0, 1, 2, ...
    `watch` sees each step of each batch of this replica. `prefix`: of a single prompt, the keys and
    values of an earlier text that are used again.
    """
    forward = model if isinstance(model, Forward) else Forward(model)
    encoded = [_encoded(tokenizer, prompt, settings) for prompt in prompts]
    limits = text_limits(encoded, settings, positions_of(forward.model), room)
    numbers = range(len(prompts)) if numbers is None else numbers
    copies = settings.num_return_sequences
    mine = range(rank, len(prompts) * copies, data_parallel)
    done: list[tuple[int, Generation]] = []
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        of = [text // copies for text in batch]
        news = continue_tokens(
            forward, [encoded[i].ids for i in of], settings, limits=[limits[i] for i in of],
            indices=[
                numbers[i] + text % copies * FURTHER for i, text in zip(of, batch, strict=True)
            ],
            seed=seed, device=device, watch=watch, tokenizer=tokenizer, prefix=prefix,
        )  # fmt: skip
        for index, i, new in zip(batch, of, news, strict=True):
            prompt = encoded[i]
            text = continued_text(tokenizer, prompt.text, prompt.ids, new)
            done.append((index, Generation(prompt=prompt.text, text=text, tokens=tuple(new))))
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


def _encoded(
    tokenizer: Any, prompt: str | EncodedPrompt, settings: GenerationSettings
) -> EncodedPrompt:
    if isinstance(prompt, EncodedPrompt):
        return prompt
    ids = tuple(tokenizer(prompt)["input_ids"])
    if not ids and settings.bos_token_id is not None:
        ids = (settings.bos_token_id,)
    return EncodedPrompt(text=prompt, ids=ids)


def text_limits(
    prompts: Sequence[EncodedPrompt], settings: GenerationSettings, positions: int | None,
    room: int | None,
) -> list[int]:  # fmt: skip
    """The longest length of the text of each prompt, in tokens. Raises UserError for prompts that
    are too long. `positions`: of the model; `room`: see `generate`."""
    lengths, places = [len(prompt.ids) for prompt in prompts], [prompt.where for prompt in prompts]
    if room is None:
        return token_limits(lengths, settings, positions, places)
    one = replace(settings, max_new_tokens=1)
    token_limits(lengths, one, positions, places)  # none is too long
    return [min(length + room, positions or length + room) for length in lengths]
