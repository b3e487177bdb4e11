"""The text of one prompt, printed while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from launcher.predict.encode import EncodedPrompt
from launcher.predict.text_stream import TextStream, for_terminal

Write = Callable[[str], None]


class Stream:
    """Prints each piece of a text: of a continued text also the prompt, of a rendered one only the
    answer. Without `write` it prints nothing, on ranks that only take part."""

    def __init__(self, tokenizer: Any, prompt: EncodedPrompt, write: Write | None) -> None:
        self._write: Write = write or (lambda text: None)
        self._text = TextStream(tokenizer, prompt.ids)
        self._waiting = prompt.text if prompt.conversation is None else ""

    def watch(self, tokens: Sequence[int | None]) -> bool:
        """The watch of `continue_tokens`: takes the token of the first row, and never stops."""
        if tokens[0] is not None:
            self._write(for_terminal(self._waiting + self._text.push(tokens[0])))
            self._waiting = ""
        return False

    def close(self) -> None:
        """Print the rest, and end the line."""
        self._write(for_terminal(self._text.finish()) + "\n")
