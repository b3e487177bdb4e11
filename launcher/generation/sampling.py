"""How the next token of a prompt is chosen from its scores.

Owns the logits processors and the random draws. Invariant: a choice depends on the tokens of its
prompt alone; a draw is a function of (seed, prompt index, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launcher.generation.draw import draw, draw_seed
from launcher.generation.settings import GenerationSettings


class Chooser:
    """The tokens of one prompt so far, and how the next one is chosen."""

    def __init__(
        self, settings: GenerationSettings, prompt: Sequence[int], index: int, seed: int,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.tokens = list(prompt)
        self.settings, self.index, self.seed, self.device = settings, index, seed, device
        self.prompt_length = len(prompt)
        self.processors = processors_of(settings, len(prompt), device)

    def choose(self, scores: Tensor) -> int:
        """The next token from `scores` [1, vocabulary]; it is not appended."""
        scores = scores.float()
        if self.processors:
            scores = self.processors(torch.tensor([self.tokens], device=self.device), scores)
        return self._draw(scores) if self.settings.do_sample else int(scores.argmax())

    def append(self, token: int) -> None:
        """Append the token that was chosen, here or on another rank."""
        self.tokens.append(token)

    def _draw(self, scores: Tensor) -> int:
        step = len(self.tokens) - self.prompt_length
        return int(draw(scores, [draw_seed(self.seed, self.index, step)]))


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
