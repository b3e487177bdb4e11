"""One forward of all rows of a batch: from token ids to the scores of the next token.

Owns what the loop over steps does not know: on which ranks the model is. A *replica* is the ranks
that hold one copy of the model (tensor and pipeline parallelism); they continue the same rows.
Invariants: every rank of a replica makes the same calls in the same order; one rank of it chooses
the tokens, and the others get them from it, so that they never depend on the last bits of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import Tensor, nn

from models.cache import KVCache


class LastText:
    """The tokens of the last text and their keys and values, for a prompt that begins as it does:
    the next turn of a chat."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cache: KVCache | None = None

    def take(self, prompt: Sequence[int], limit: int) -> KVCache | None:
        """The cache of the tokens that `prompt` begins with, for a text of at most `limit` tokens;
        None if there are none. The last token of a prompt is always left: its scores are needed."""
        cache, self.cache = self.cache, None
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if cache is None or common == 0:
            return None
        cache.truncate(common)
        cache.limit = limit
        return cache

    def keep(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep the cache of a text, of which the last tokens may not have been fed."""
        self.tokens, self.cache = list(tokens[: cache.length]), cache


class Forward:
    """The forward of a model that this process holds completely."""

    chooses = True
    """Whether this rank gets the scores and chooses the tokens of its replica."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.last_text: LastText | None = None
        """Where single prompts continue the text before them, that text; None: it is not kept."""

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor | None:
        """Scores [rows, vocabulary] of the token after `ids` [rows, n], on the rank that chooses;
        None elsewhere.

        `cache` knows the padding of the rows, has the keys and values of the past, and is extended.
        """
        logits: Tensor = self.model(ids, cache=cache, last_only=True)
        return logits[:, -1]

    def share(self, tokens: Tensor) -> Tensor:
        """`tokens` [rows] int64 of the rank that chooses, on every rank of the replica."""
        return tokens

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on any rank of the replica."""
        return flag

    def finish(self) -> None:
        """Called after the last batch of this rank: it helps ranks that still have some."""
