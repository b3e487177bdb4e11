"""From prompt tokens to new tokens.

Owns the generation settings and the loop. Invariants: the continuation of a prompt does not depend
on the other prompts of its batch (lengths, penalties and random draws are per prompt; a draw is a
function of (seed, prompt index, step)); greedy continuations are those of `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn

from launcher.errors import UserError
from models.attention import KVCache
from models.transformers_model import TransformersModel

_DEFAULTS: dict[str, Any] = {
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None,
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip


_SMALLEST_DIVISOR = 1e-30
"""Of logits: a smaller one makes them infinite in float32. Such a temperature draws the most likely
token either way."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to continue prompts; the names are those of transformers."""

    max_length: int = 20
    """Longest text in tokens, with the prompt; no effect when `max_new_tokens` is given."""
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int = 0


def generation_settings(
    *sources: Mapping[str, Any], tokenizer: Any = None, hf_config: Mapping[str, Any] | None = None
) -> GenerationSettings:
    """Settings from `sources`, highest priority first: keys written in `generation_config`, those
    in `model_config`, the directory's generation_config.json.

    Keys that none of them has take the defaults; special tokens then come from `hf_config` (the
    model's config.json) and from the tokenizer. Other keys of the sources are ignored.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        # max_length in one source is not undone by max_new_tokens in one of lower priority.
        limited = {"min_new_tokens"} if "min_length" in merged else set()
        limited |= {"max_new_tokens"} if "max_length" in merged else set()
        given = {key for key in source if key in _DEFAULTS and source[key] is not None}
        merged = {key: source[key] for key in given - limited} | merged
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        in_config = (hf_config or {}).get(key)
        value = in_config if in_config is not None else getattr(tokenizer, key, None)
        merged.setdefault(key, value)
    settings = _DEFAULTS | merged
    for key in ("temperature", "repetition_penalty"):
        settings[key] = max(settings[key], _SMALLEST_DIVISOR)
    end, padding = settings.pop("eos_token_id"), settings.pop("pad_token_id")
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    vocabulary = (hf_config or {}).get("vocab_size")
    if padding is None:
        padding = ends[0] if ends else 0
    if isinstance(vocabulary, int) and not 0 <= padding < vocabulary:
        padding = 0  # padding is masked, but it has to be in the embedding
    return GenerationSettings(**settings, eos_token_ids=ends, pad_token_id=padding)


def token_limits(
    lengths: Sequence[int], settings: GenerationSettings, positions: int | None
) -> list[int]:
    """The longest length of each text, in tokens. Raises UserError for prompts that are too long.

    `positions`: how many the model has; None: no limit.
    """
    limits = []
    for index, length in enumerate(lengths):
        what = f"prompt {index + 1} has {length} tokens"
        if length == 0:
            raise UserError(
                f"prompt {index + 1} is empty", rule="generation needs a first token",
                advice="Write a prompt, or set generation_config.bos_token_id",
            )  # fmt: skip
        if positions is not None and length >= positions:
            raise UserError(what, rule=f"the model has {positions} positions",
                            advice="Shorten the prompt")  # fmt: skip
        new = settings.max_new_tokens
        limit = settings.max_length if new is None else length + new
        if length >= limit:
            raise UserError(what, rule=f"max_length = {limit} counts the prompt",
                            nearest=f"Nearest: generation_config.max_length: {length + 1}",
                            advice="Or set generation_config.max_new_tokens")  # fmt: skip
        if positions is not None and limit > positions:
            key = "max_length" if new is None else "max_new_tokens"
            nearest = positions if new is None else positions - length
            raise UserError(
                f"{what}, generation_config.{key} = {settings.max_length if new is None else new}",
                rule=f"the model has {positions} positions", nearest=f"Nearest: {nearest}",
            )  # fmt: skip
        limits.append(limit)
    return limits


@torch.no_grad()
def continue_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    limits: Sequence[int],
    indices: Sequence[int],
    seed: int,
    device: torch.device | str,
) -> list[list[int]]:
    """The new tokens of each prompt of one batch, with the end token where there is one.

    `indices`: the indices of the prompts among all, for random draws. A module of transformers
    continues its prompts one by one, with its own `generate`; it must not be sharded.
    """
    training = model.training
    model.eval()
    try:
        if isinstance(model, TransformersModel):
            return [
                _continue_with_transformers(model, prompt, settings, limit, index, seed, device)
                for prompt, limit, index in zip(prompts, limits, indices, strict=True)
            ]
        return _continue_batch(model, prompts, settings, limits, indices, seed, device)
    finally:
        model.train(training)


def _continue_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], settings: GenerationSettings,
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
        _Chooser(settings, prompt, index, seed, device)
        for prompt, index in zip(prompts, indices, strict=True)
    ]
    rooms = [limit - len(prompt) for prompt, limit in zip(prompts, limits, strict=True)]
    cache = KVCache(capacity=longest + max(rooms))
    running = list(range(len(prompts)))
    while True:
        logits = model(ids, attention_mask=mask if padded else None, cache=cache, last_only=True)
        scores = logits[:, -1].float()
        likeliest = scores.argmax(dim=-1).tolist()
        next_ids = [settings.pad_token_id] * len(prompts)
        for row in list(running):
            next_ids[row] = choosers[row].choose(scores[row : row + 1], likeliest[row])
            ended = next_ids[row] in settings.eos_token_ids
            if ended or len(choosers[row].tokens) >= limits[row]:
                running.remove(row)
        if not running:
            break
        ids = torch.tensor(next_ids, device=device)[:, None]
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
    return [c.tokens[len(p) :] for c, p in zip(choosers, prompts, strict=True)]


class _Chooser:
    """The tokens of one prompt so far, and how the next one is chosen."""

    def __init__(
        self, settings: GenerationSettings, prompt: Sequence[int], index: int, seed: int,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.tokens = list(prompt)
        self.settings, self.index, self.seed, self.device = settings, index, seed, device
        self.prompt_length = len(prompt)
        self.processors = _processors(settings, len(prompt), device)

    def choose(self, scores: Tensor, likeliest: int) -> int:
        """The next token from `scores` [1, vocabulary], of which `likeliest` is the argmax."""
        token = likeliest
        if self.processors:
            scores = self.processors(torch.tensor([self.tokens], device=self.device), scores)
            token = int(scores.argmax())
        if self.settings.do_sample:
            token = self._draw(scores)
        self.tokens.append(token)
        return token

    def _draw(self, scores: Tensor) -> int:
        step = len(self.tokens) - self.prompt_length
        generator = torch.Generator().manual_seed(draw_seed(self.seed, self.index, step))
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator))


def draw_seed(seed: int, index: int, step: int) -> int:
    """The seed of one random draw."""
    return xxhash.xxh3_64_intdigest(f"generation/{seed}/{index}/{step}".encode())


def _processors(settings: GenerationSettings, prompt_length: int, device: Any) -> Any:
    """The logits processors, in the order of transformers."""
    from transformers.generation import logits_process as process

    ends, found = list(settings.eos_token_ids), process.LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        found.append(process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size > 0:
        found.append(process.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.bad_words_ids:
        words = process.NoBadWordsLogitsProcessor(settings.bad_words_ids, ends or None)
        found.append(words)
    if ends and settings.min_length > 0:
        found.append(process.MinLengthLogitsProcessor(settings.min_length, ends, device=device))
    if ends and settings.min_new_tokens:
        found.append(
            process.MinNewTokensLengthLogitsProcessor(
                prompt_length, settings.min_new_tokens, ends, device=device
            )
        )
    if settings.suppress_tokens:
        found.append(process.SuppressTokensLogitsProcessor(settings.suppress_tokens, device))
    if settings.begin_suppress_tokens:
        found.append(
            process.SuppressTokensAtBeginLogitsProcessor(
                settings.begin_suppress_tokens, prompt_length, device
            )
        )
    if settings.do_sample:
        if settings.temperature != 1.0:
            found.append(process.TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            found.append(process.TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            found.append(process.TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            found.append(process.MinPLogitsWarper(settings.min_p))
        if settings.typical_p < 1.0:
            found.append(process.TypicalLogitsWarper(settings.typical_p))
        if 0.0 < settings.epsilon_cutoff < 1.0:
            found.append(process.EpsilonLogitsWarper(settings.epsilon_cutoff))
        if 0.0 < settings.eta_cutoff < 1.0:
            found.append(process.EtaLogitsWarper(settings.eta_cutoff, device=device))
    return found


def _continue_with_transformers(
    model: TransformersModel, prompt: Sequence[int], settings: GenerationSettings, limit: int,
    index: int, seed: int, device: torch.device | str,
) -> list[int]:  # fmt: skip
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {}
    if settings.do_sample:
        sampling = {"temperature": settings.temperature, "top_k": settings.top_k,
                    "top_p": settings.top_p, "min_p": settings.min_p,
                    "typical_p": settings.typical_p, "epsilon_cutoff": settings.epsilon_cutoff,
                    "eta_cutoff": settings.eta_cutoff}  # fmt: skip
    config = GenerationConfig(
        max_length=limit,
        min_length=settings.min_length,
        min_new_tokens=settings.min_new_tokens,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        bad_words_ids=settings.bad_words_ids,
        suppress_tokens=settings.suppress_tokens,
        begin_suppress_tokens=settings.begin_suppress_tokens,
        eos_token_id=list(settings.eos_token_ids) or None,
        pad_token_id=settings.pad_token_id,
        **sampling,
    )
    ids = torch.tensor([list(prompt)], device=device)
    with torch.random.fork_rng():
        torch.manual_seed(draw_seed(seed, index, 0))
        text = cast(Any, model.wrapped).generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
    return text[0, len(prompt) :].tolist()
