"""Tokenizers in Python, as worker processes can load them: one works, the others fail."""

from __future__ import annotations

import os
import signal
from typing import Any, ClassVar


class ByteTokenizer:
    """A token for each byte of UTF-8."""

    is_fast = False
    eos_token_id, pad_token_id = 256, 257
    chat_template = None
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    def __len__(self) -> int:
        return 258

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(258)}


class Fails(ByteTokenizer):
    """Has a bug with the text `fail`, and is killed by the text `die`."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Any]:
        if any("fail" in text for text in texts):
            raise ZeroDivisionError("a bug")
        if any("die" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(texts, add_special_tokens=add_special_tokens)


class Unpicklable(ByteTokenizer):
    """Cannot be sent to another process."""

    def __reduce__(self) -> Any:
        raise TypeError("it has a lock")


def _cannot_load() -> Any:
    raise ImportError("no module named `mine`")


class Unloadable(ByteTokenizer):
    """Can be sent, and cannot be made again there."""

    def __reduce__(self) -> Any:
        return _cannot_load, ()
