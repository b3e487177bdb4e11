"""Documents to tokens, many at a time.

Owns the call of the tokenizer for plain text. Invariants: the tokens of a document are those of its
text and, where the tokenizer has one, its end token behind them; no other special token is added;
the tokenizer's own truncation and padding settings have no say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

BATCH_CHARACTERS = 1 << 22
LONGEST_PIECE = 1 << 22
"""Characters. A longer document is tokenised in pieces cut behind a line, else a single file of
some gigabytes would need a hundred times its size in memory; only tokens at a cut can differ."""


def backend_of(tokenizer: Any) -> Any:
    """The Rust tokenizer inside a fast tokenizer, set to give all tokens and no padding."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


@contextmanager
def exact_offsets(backend: Any) -> Iterator[Any]:
    """The Rust tokenizer set to give the characters of each token, its leading space included.

    The post-processor of many byte-level tokenizers (`trim_offsets`) takes spaces out of them.
    """
    processor = backend.post_processor
    backend.post_processor = None
    try:
        yield backend
    finally:
        backend.post_processor = processor


def tokenise_documents(documents: Iterable[str], tokenizer: Any) -> Iterator[list[list[int]]]:
    """The tokens of documents, in batches, in order; each ends with the end token, if any."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for batch in _batches(documents):
        pieces = [piece for text in batch for piece in _pieces(text)]
        encoded = iter(_encode(pieces, tokenizer))
        yield [
            [token for _ in _pieces(text) for token in next(encoded)] + end
            if len(text) > LONGEST_PIECE
            else next(encoded) + end
            for text in batch
        ]


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if getattr(tokenizer, "is_fast", False):
        encodings = backend_of(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> list[str]:
    pieces = []
    begin = 0
    while len(text) - begin > LONGEST_PIECE:
        cut = text.rfind("\n", begin, begin + LONGEST_PIECE) + 1
        cut = cut if cut > begin else begin + LONGEST_PIECE
        pieces.append(text[begin:cut])
        begin = cut
    pieces.append(text[begin:])
    return pieces
