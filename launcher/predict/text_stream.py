"""Tokens to text as they come, in pieces that never change.

Owns when a piece of text is final. Invariants: the pieces joined are the text of all tokens decoded
at once, apart from a character at the end that was never completed; no piece ends within a
character: bytes that are not a complete character of UTF-8 yet are held back until the tokens after
them complete it, or show that they never will.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What tokenizers decode bytes to that are no character, or not one yet."""
_LONGEST_CHARACTER = 4
"""Bytes, so also tokens, of a character of UTF-8."""


class TextStream:
    """The text of one continuation, piece by piece.

    Decodes the tokens since the last piece together with those before them (of the prompt, then of
    that piece), as some tokenizers write a space only between two words.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._begin, self._end = 0, len(self._ids)
        # This setting of a tokenizer removes spaces that it wrote before: words are final at the
        # space behind them.
        self._by_words = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._sent = 0
        """Characters of the window, after those of the tokens before it, that are sent already."""

    def push(self, token: int) -> str:
        """The text that became final with one more token, often none."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest of the text, without a character that was never completed."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._begin : self._end])
        text = self._decode(self._ids[self._begin :])
        # A run of byte tokens that ends within a character may be decoded as no character at all.
        is_stable = text.startswith(before)
        new = text[len(before) :] if is_stable else self._decode(self._ids[self._end :])
        if final:
            return new[self._sent :].rstrip(REPLACEMENT)
        complete = _words(new) if self._by_words else _complete(new)
        piece = complete[self._sent :]
        self._sent += len(piece)
        if len(complete) == len(new) and new:  # everything is sent: the window begins here
            self._begin, self._end, self._sent = self._end, len(self._ids), 0
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def for_terminal(text: str) -> str:
    """A text without characters that control a terminal: they are shown as `\\x1b`."""
    return "".join(
        c if (c >= " " and c != "\x7f") or c in "\n\t" else f"\\x{ord(c):02x}" for c in text
    )


def _complete(text: str) -> str:
    """`text` without what may be the beginning of a character at its end."""
    held = 0
    while held < _LONGEST_CHARACTER - 1 and text.endswith(REPLACEMENT * (held + 1)):
        held += 1
    return text[: len(text) - held]


def _words(text: str) -> str:
    """`text` up to its last space or line break."""
    return text[: max(text.rfind(" "), text.rfind("\n")) + 1]
