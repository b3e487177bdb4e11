"""How the next token of a prompt is chosen from its scores.

Owns the logits processors, and which of them see one text and which all rows of a batch at once.
Invariant: a choice depends on the scores and the tokens of its text alone; a draw also on seed,
index and step (`launcher.generation.draw`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from launcher.generation.draw import draw, draw_seed
from launcher.generation.settings import GenerationSettings

_OF_SCORES_ALONE = frozenset({
    "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper",
    "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper",
})  # fmt: skip
"""Processors of transformers that do not look at the tokens of a text, and treat each row of scores
by itself."""


class Chooser:
    """The tokens of the texts of a batch so far, and how the next ones are chosen."""

    def __init__(
        self, settings: GenerationSettings, prompts: Sequence[Sequence[int]],
        limits: Sequence[int], indices: Sequence[int], seed: int, device: torch.device | str,
    ) -> None:  # fmt: skip
        """`limits`: of the texts, in tokens. `indices`: see `launcher.generation.draw`."""
        self.settings, self.indices, self.seed, self.device = settings, indices, seed, device
        self.tokens = [list(prompt) for prompt in prompts]
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.by_text: list[Any] = []
        """Of each text the processors that look at its tokens, and those between them."""
        self.by_scores: Any = []
        """The processors behind them, which are applied to all rows at once."""
        for prompt, limit in zip(prompts, limits, strict=True):
            processors = processors_of(settings, prompt, limit, device)
            first = len(processors)
            while first and type(processors[first - 1]).__name__ in _OF_SCORES_ALONE:
                first -= 1
            self.by_text.append(processors[:first])
            self.by_scores = processors[first:]

    def choose(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """The next tokens [rows] int64 of the texts `rows`, from their scores [rows, vocabulary].
        They are not appended."""
        scores = self._processed(scores, rows)
        if not self.settings.do_sample:
            return scores.argmax(dim=-1)
        return self._drawn(scores, rows)

    def append(self, row: int, token: int) -> None:
        """Append the token that was chosen, here or on another rank, to a text."""
        self.tokens[row].append(token)

    def news(self) -> list[list[int]]:
        """The new tokens of each text."""
        return [
            tokens[length:] for tokens, length in zip(self.tokens, self.prompt_lengths, strict=True)
        ]

    def _processed(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        if self.by_text[0]:
            scores = torch.cat([
                self._of_text(row, scores[at : at + 1].float()) for at, row in enumerate(rows)
            ])  # fmt: skip
        for processor in self.by_scores:
            scores = processor(None, scores.float())
        return scores

    def _of_text(self, row: int, scores: Tensor) -> Tensor:
        ids = torch.tensor([self.tokens[row]], device=self.device)
        for processor in self.by_text[row]:
            scores = processor(ids, scores)
        return scores

    def _drawn(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        steps = [len(self.tokens[row]) - self.prompt_lengths[row] for row in rows]
        return draw(scores, [
            draw_seed(self.seed, self.indices[row], step)
            for row, step in zip(rows, steps, strict=True)
        ])  # fmt: skip


def processors_of(
    settings: GenerationSettings, prompt: Sequence[int], limit: int, device: torch.device | str
) -> Any:
    """The logits processors of one prompt, in the order of transformers. `limit`: of the text, in
    tokens. (`renormalize_logits` needs none: adding a constant to all scores changes no choice.)"""
    from transformers.generation import LogitsProcessorList

    warpers = _warpers(settings, device) if settings.do_sample else []
    return LogitsProcessorList([
        *_penalties(settings, prompt, device),
        *_bounds(settings, prompt, limit, device),
        *warpers,
    ])  # fmt: skip


def _penalties(settings: GenerationSettings, prompt: Sequence[int], device: Any) -> Iterator[Any]:
    """What makes tokens more or less likely, or forbids them."""
    from transformers.generation import logits_process as process

    ids: Any = torch.tensor([list(prompt)], device=device)
    if settings.sequence_bias:
        yield process.SequenceBiasLogitsProcessor(settings.sequence_bias)
    if settings.encoder_repetition_penalty != 1.0:
        yield process.EncoderRepetitionPenaltyLogitsProcessor(
            settings.encoder_repetition_penalty, ids
        )
    if settings.repetition_penalty != 1.0:
        yield process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
    if settings.no_repeat_ngram_size > 0:
        yield process.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size)
    if settings.encoder_no_repeat_ngram_size > 0:
        yield process.EncoderNoRepeatNGramLogitsProcessor(
            settings.encoder_no_repeat_ngram_size, ids
        )
    if settings.bad_words_ids:
        ends = list(settings.eos_token_ids) or None
        yield process.NoBadWordsLogitsProcessor(settings.bad_words_ids, ends)


def _bounds(
    settings: GenerationSettings, prompt: Sequence[int], limit: int, device: Any
) -> Iterator[Any]:
    """What concerns the beginning and the end of the new tokens."""
    from transformers.generation import logits_process as process

    ends, length = list(settings.eos_token_ids), len(prompt)
    if ends and settings.min_length > 0:
        yield process.MinLengthLogitsProcessor(settings.min_length, ends, device=device)
    if ends and settings.min_new_tokens:
        yield process.MinNewTokensLengthLogitsProcessor(
            length, settings.min_new_tokens, ends, device=device
        )
    if settings.forced_bos_token_id is not None:
        yield process.ForcedBOSTokenLogitsProcessor(settings.forced_bos_token_id)
    if settings.forced_eos_token_id is not None:
        yield process.ForcedEOSTokenLogitsProcessor(
            limit, settings.forced_eos_token_id, device=device
        )
    if ends and settings.exponential_decay_length_penalty is not None:
        yield process.ExponentialDecayLengthPenalty(
            settings.exponential_decay_length_penalty, ends, length
        )
    if settings.suppress_tokens:
        yield process.SuppressTokensLogitsProcessor(settings.suppress_tokens, device)
    if settings.begin_suppress_tokens:
        forced = length == 1 and settings.forced_bos_token_id is not None
        yield process.SuppressTokensAtBeginLogitsProcessor(
            settings.begin_suppress_tokens, length + forced, device
        )


def _warpers(settings: GenerationSettings, device: Any) -> Iterator[Any]:
    """What changes the distribution that tokens are drawn from."""
    from transformers.generation import logits_process as process

    if settings.temperature != 1.0:
        yield process.TemperatureLogitsWarper(settings.temperature)
    if settings.top_h is not None:
        yield process.TopHLogitsWarper(settings.top_h)
    if settings.top_k > 0:
        yield process.TopKLogitsWarper(settings.top_k)
    if settings.top_p < 1.0:
        yield process.TopPLogitsWarper(settings.top_p)
    if settings.min_p is not None:
        yield process.MinPLogitsWarper(settings.min_p)
    if settings.typical_p < 1.0:
        yield process.TypicalLogitsWarper(settings.typical_p)
    if 0.0 < settings.epsilon_cutoff < 1.0:
        yield process.EpsilonLogitsWarper(settings.epsilon_cutoff)
    if 0.0 < settings.eta_cutoff < 1.0:
        yield process.EtaLogitsWarper(settings.eta_cutoff, device=device)
