"""Samples to tokens, chunk by chunk: the unit of work of one process or of several.

Owns what is in a chunk and what comes out of it. Invariants: a chunk is encoded on its own, so that
its tokens, its counts and its errors are the same whoever encodes it; what was counted while its
samples were read comes before what was counted while it was encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data import tokens as tokens_room
from launcher.data.loaders import loader_of
from launcher.data.loaders.base import Recipe
from launcher.data.store import INDEX_DTYPE, TOKEN_DTYPE
from launcher.data.tally import Tally

TEXT_SAMPLES = 8192
CONVERSATIONS = 256
"""Conversations whose errors are reported together (`launcher.data.chat`)."""


@dataclass(frozen=True)
class Chunk:
    """Samples, and what was counted while they were read."""

    samples: list[Any]
    counted: Tally


@dataclass(frozen=True)
class EncodedChunk:
    """The tokens of a chunk, and what was counted meanwhile."""

    lengths: npt.NDArray[np.int64]
    """Tokens of each sample."""
    tokens: npt.NDArray[np.uint32]
    targets: npt.NDArray[np.bool_ | np.uint8] | None
    tally: Tally
    lines: list[str]
    """For the log."""


def chunks_of(samples: Iterable[Any], recipe: Recipe, counted: Tally) -> Iterator[Chunk]:
    """The chunks of `samples`, which are counted in `counted` while they are read. The last one may
    have no samples, only counts."""
    most = CONVERSATIONS if loader_of(recipe.loader).has_targets else TEXT_SAMPLES
    chunk: list[Any] = []
    characters = 0
    for sample in samples:
        chunk.append(sample)
        characters += len(getattr(sample, "text", ""))
        if len(chunk) == most or characters >= tokens_room.BATCH_CHARACTERS:
            yield Chunk(chunk, counted.take())
            chunk, characters = [], 0
    yield Chunk(chunk, counted.take())


def encode(samples: list[Any], recipe: Recipe) -> EncodedChunk:
    """The tokens of the samples of a chunk. Raises UserError as the loader does."""
    tally, lines = Tally(), list[str]()
    batches = list(
        loader_of(recipe.loader).tokenize(samples, replace(recipe, log=lines.append), tally)
    )
    documents = [document for batch in batches for document in batch.tokens]
    targets = [one for batch in batches for one in batch.is_target]
    return EncodedChunk(
        lengths=np.fromiter(map(len, documents), dtype=INDEX_DTYPE, count=len(documents)),
        tokens=np.fromiter(chain.from_iterable(documents), dtype=TOKEN_DTYPE),
        targets=np.concatenate(targets) if targets else None,
        tally=tally,
        lines=lines,
    )
