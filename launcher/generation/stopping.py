"""When the text of a prompt has ended: an end token, a stop string, or its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from launcher.generation.settings import GenerationSettings


class Stopping:
    """Whether a text has ended. Every rank of a replica comes to the same answer, as it depends on
    tokens alone."""

    def __init__(self, settings: GenerationSettings, tokenizer: Any = None) -> None:
        """`tokenizer`: needed with stop_strings, whose criterion is that of transformers."""
        self.ends = frozenset(settings.eos_token_ids)
        self._strings: Any = None
        if settings.stop_strings:
            from transformers.generation.stopping_criteria import StopStringCriteria

            if tokenizer is None:
                raise ValueError("stop_strings need a tokenizer")
            self._strings = StopStringCriteria(tokenizer, list(settings.stop_strings))

    def has_ended(self, tokens: Sequence[int], limit: int) -> bool:
        """Whether the text `tokens`, whose last token is new, has ended. `limit`: in tokens."""
        if len(tokens) >= limit or tokens[-1] in self.ends:
            return True
        if self._strings is None:
            return False
        # A stop string has no more tokens than bytes or characters.
        last = tokens[-self._strings.maximum_token_len - 1 :]
        return bool(self._strings(torch.tensor([list(last)]), None)[0])
