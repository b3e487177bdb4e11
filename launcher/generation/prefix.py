"""The keys and values of a text, kept for texts that begin like it: the next turn of a chat.

Invariant: what is kept belongs to the tokens of `ids`, whatever stopped the generation. The reused
keys are those of an earlier forward, so results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.cache import BLOCK, KVCache
from models.decoder import Decoder


class PrefixCache:
    """The cache of one text; empty at first."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._cache: KVCache | None = None
        self.reused = 0
        """Tokens of the last prompt that were not computed again."""

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether the keys of a token do not depend on the length of the text."""
        return isinstance(model, Decoder) and model.rotary.by_position

    def begin(self, prompt: Sequence[int], limit: int) -> KVCache:
        """The cache for a text of at most `limit` tokens that begins with `prompt`. It has the
        first `reused` tokens, which are not to be given to the model again."""
        same = 0
        for kept, token in zip(self.ids, prompt[:-1], strict=False):
            if kept != token:
                break
            same += 1
        cache = self._cache
        if cache is None or same == 0:
            same, cache = 0, KVCache(min(limit, len(prompt) + BLOCK), limit=limit)
        cache.truncate(same)
        cache.limit = max(limit, cache.capacity)
        self._cache, self.reused, self.ids = cache, same, list(prompt[:same])
        return cache

    def end(self, ids: Sequence[int]) -> None:
        """Keep what was computed: the first tokens of the text `ids`."""
        assert self._cache is not None
        self.ids = list(ids[: self._cache.length])
