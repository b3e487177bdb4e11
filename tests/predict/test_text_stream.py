"""Text as it comes: whole characters only, and all pieces together are the decoded text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.predict.text_stream import TextStream, for_terminal
from tests.predict.tiny_tokenizer import tiny_tokenizer

TEXTS = ["plain words, two  spaces", "日本語 é Ж 😀👩‍🚀 हिन्दी", "\n\ttabs\n", "a😀"]


def byte_level() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback(*, cleans: bool = False) -> Any:
    """As SentencePiece: a mark for spaces, and bytes for characters without a token."""
    words = ["<end>", "▁", *map(chr, range(33, 127)), "\n", "\t"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=cleans
    )


TOKENIZERS = {"bytes": byte_level(), "fallback": byte_fallback()}


def pieces(tokenizer: Any, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, prompt or [])
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_complete_characters_and_the_decoded_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, ids = tokenizer("Say:")["input_ids"], tokenizer(text)["input_ids"]
    found = pieces(tokenizer, [*ids, tokenizer.eos_token_id], prompt)
    before = tokenizer.decode(prompt)
    assert before + "".join(found) == tokenizer.decode([*prompt, *ids])
    assert not any("\ufffd" in piece for piece in found)
    assert sum(map(bool, found)) > len(text) // 2  # it does come piece by piece


@pytest.mark.parametrize("name", TOKENIZERS)
def test_half_a_character_at_the_end_is_not_printed(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("x日")["input_ids"]
    assert "".join(pieces(tokenizer, ids[:-1])) == "x"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_never_become_a_character_are_shown_once_that_is_sure(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    half = tokenizer("日")["input_ids"][:-1]
    after = tokenizer.convert_tokens_to_ids("A")
    found = pieces(tokenizer, [*half, after, after])
    assert not any(found[: len(half)])
    joined = "".join(found)
    assert joined == tokenizer.decode([*half, after, after])
    assert joined.rstrip("A").strip("\ufffd ") == ""


def test_a_character_after_complete_bytes_does_not_change_them() -> None:
    tokenizer = TOKENIZERS["fallback"]
    ids = tokenizer("日本語")["input_ids"]
    assert [piece for piece in pieces(tokenizer, ids) if piece] == ["日", "本", "語"]


def test_words_wait_for_their_end_where_the_tokenizer_removes_spaces() -> None:
    tokenizer = byte_fallback(cleans=True)
    ids = tokenizer("one two .")["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert found[-1]


def test_tokens_of_words_come_at_once() -> None:
    tokenizer = tiny_tokenizer()
    assert pieces(tokenizer, tokenizer("ab c")["input_ids"]) == ["a", "b", " ", "c", ""]


def test_controls_of_a_terminal_are_shown_as_escapes() -> None:
    assert for_terminal("\x1b[31mé\n\t\x7f日") == "\\x1b[31mé\n\t\\x7f日"
