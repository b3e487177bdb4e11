"""Documents to tokens, in batches.

Owns the calls of the tokenizer for plain text. Invariants: the tokens of a document are those of
its text, followed by the end-of-sequence token where the tokenizer has one; no other special token
is added; the tokenizer's own truncation and padding settings are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

BATCH_CHARACTERS = 1 << 22
LONGEST_PIECE = 1 << 22
"""Characters. A longer document is tokenized in pieces that end at a line break: a file of some
gigabytes would need a hundred times its size in memory. Only the tokens at a cut can differ."""


def backend_of(tokenizer: Any) -> Any:
    """The Rust tokenizer of a fast tokenizer, with truncation and padding turned off."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


@contextmanager
def exact_offsets(backend: Any) -> Iterator[Any]:
    """The Rust tokenizer with offsets that include the leading space of a token.

    The post-processor of many byte-level tokenizers (`trim_offsets`) excludes it.
    """
    processor = backend.post_processor
    backend.post_processor = None
    try:
        yield backend
    finally:
        backend.post_processor = processor


def tokenize_documents(documents: Iterable[str], tokenizer: Any) -> Iterator[list[list[int]]]:
    """The tokens of documents, in batches, in order; each ends with the EOS token, if any."""
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
