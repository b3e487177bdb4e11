"""How the next token of a prompt is chosen from its scores.

Owns the logits processors, and which of them see one text and which all rows of a batch at once.
Invariant: a choice depends on the tokens of its prompt alone; a draw is a function of (seed, prompt
index, step).
"""

from __future__ import annotations

from collections.abc import Sequence
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
        indices: Sequence[int], seed: int, device: torch.device | str,
    ) -> None:  # fmt: skip
        """`indices` of the prompts among all, for random draws."""
        self.settings, self.indices, self.seed, self.device = settings, indices, seed, device
        self.tokens = [list(prompt) for prompt in prompts]
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.by_text: list[Any] = []
        """Of each text the processors that look at its tokens, and those between them."""
        self.by_scores: Any = []
        """The processors behind them, which are applied to all rows at once."""
        for length in self.prompt_lengths:
            processors = processors_of(settings, length, device)
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

    def length(self, row: int) -> int:
        """Tokens of a text, with its prompt."""
        return len(self.tokens[row])

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


def processors_of(settings: GenerationSettings, prompt_length: int, device: Any) -> Any:
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
