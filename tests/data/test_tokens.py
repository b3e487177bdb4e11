"""Documents to tokens: the same as one call of the tokenizer each, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.data import tokens
from launcher.data.tokens import tokenize_documents

from .conftest import train_tokenizer
from .tokenizers_of_kinds import WithoutOffsets

DOCUMENTS = ["The ship.", "x", "It slides\ndown the slipway.\n" * 30, "\u00e9\u4e2d\U0001f6a2", " "]


def flat(documents: list[str], tokenizer: Any) -> list[list[int]]:
    return [one for batch in tokenize_documents(documents, tokenizer) for one in batch]


@pytest.mark.parametrize("batch_characters", [1, 50, 10**6])
@pytest.mark.parametrize("fast", [True, False])
def test_every_document_ends_with_the_end_token(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, batch_characters: int, fast: bool
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", batch_characters)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] + [0] for text in DOCUMENTS]
    assert flat(DOCUMENTS, tokenizer if fast else WithoutOffsets(tokenizer)) == expected


def test_without_an_end_token_nothing_is_added() -> None:
    bare = train_tokenizer(eos_token=None)
    assert flat(["ship"], bare) == [bare("ship", add_special_tokens=False)["input_ids"]]


def test_a_long_document_is_tokenised_in_pieces_and_stays_one(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = flat(DOCUMENTS, tokenizer)
    monkeypatch.setattr(tokens, "LONGEST_PIECE", 60)
    pieces = flat(DOCUMENTS, tokenizer)
    assert pieces == whole
    line = "x" * 500  # no line to cut at: cut anyway
    (document,) = flat([line], tokenizer)
    assert tokenizer.decode(document[:-1]) == line
