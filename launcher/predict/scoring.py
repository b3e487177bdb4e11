"""Scoring: log-likelihoods of given continuations, and continuations up to stop texts.

Owns the arithmetic of multiple-choice and perplexity tasks, without knowing any task. Invariants: a
score does not depend on the other rows of its batch; all ranks of a replica make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.generation.forward import Forward
from launcher.generation.loop import continue_tokens
from launcher.generation.settings import GenerationSettings, token_limits


class Score(NamedTuple):
    """Of a continuation."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model that scores token ids."""

    forward: Forward
    tokenizer: Any
    device: torch.device | str
    max_length: int
    """Tokens of the longest row; longer contexts are cut on the left."""
    batch_size: int = 8
    seed: int = 0

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.forward.model

    @torch.no_grad()
    def scores(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        on_done: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """The score of each (context, continuation) of token ids, neither of them empty.

        `on_done`: called with the number of pairs of each batch. Raises `UserError` for a
        continuation of more than `max_length` tokens.
        """
        self.model.eval()
        found: list[Score | None] = [None] * len(pairs)
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, score in zip(batch, self._batch([pairs[i] for i in batch]), strict=True):
                found[index] = score
            if on_done is not None:
                on_done(len(batch))
        return [score for score in found if score is not None]

    def _batch(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterable[Score]:
        """Rows padded on the right, which no token of a causal model sees."""
        rows = [self._row(context, continuation) for context, continuation in pairs]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        logits: Tensor = self.model(ids.to(self.device))
        for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            targets = torch.tensor(list(continuation), device=self.device)
            own = logits[number, len(row) - len(targets) : len(row)].float().log_softmax(-1)
            chosen = own.gather(-1, targets[:, None])
            is_greedy = bool((own.argmax(-1) == targets).all())
            yield Score(float(chosen.sum()), is_greedy)

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """The input of the model: all but the last token, cut on the left."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens",
                rule=f"the model has {self.max_length} positions",
                advice="Leave the task out, or shorten its answers",
            )
        return [*context, *continuation][-(self.max_length + 1) :][:-1]

    def continued(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings,
        *,
        until: Sequence[str] = (),
        first_index: int = 0,
    ) -> list[str]:
        """The continuation of each prompt, cut before the first of the texts `until`.

        Prompts that leave no room for the new tokens are cut on the left. `first_index`: the number
        of the first prompt among all, for random draws.
        """
        room = max(self.max_length - (settings.max_new_tokens or 0), 1)
        encoded = [self.encode(prompt)[-room:] for prompt in prompts]
        texts: list[str] = []
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
            texts += self._continued(batch, settings, until, first_index + start)
        return texts

    def _continued(
        self,
        batch: Sequence[Sequence[int]],
        settings: GenerationSettings,
        until: Sequence[str],
        first: int,
    ) -> list[str]:
        news: list[list[int]] = [[] for _ in batch]
        done = [False] * len(batch)

        def watch(step: Sequence[int | None]) -> bool:
            for row, token in enumerate(step):
                if token is None or done[row]:
                    continue
                news[row].append(token)
                done[row] = any(stop in self.decode(news[row]) for stop in until)
            return all(is_done or token is None for is_done, token in zip(done, step, strict=True))

        limits = token_limits([len(ids) for ids in batch], settings, self.max_length)
        found = continue_tokens(
            self.forward, batch, settings, limits=limits, seed=self.seed, device=self.device,
            indices=range(first, first + len(batch)), watch=watch if until else None,
        )  # fmt: skip
        return [cut(self.decode(tokens), until) for tokens in found]

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """The token ids of a text. `special`: whether the tokenizer adds its own; None: as usual,
        unless the text begins with them."""
        mark = self.tokenizer.decode(self.prefix)
        if special is None and mark and text.startswith(mark):
            special = False
        given = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(text, **given))

    @property
    def prefix(self) -> int:
        """The token in front of a text without a context: the first token, else the last one."""
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        found = first if first is not None else last
        if found is None:
            raise UserError(
                "the tokenizer has neither a first nor an end token",
                rule="a text without a context is scored after one of them",
                advice="Set bos_token or eos_token in tokenizer_config.json",
            )
        return int(found)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first of the texts `until` in it."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
