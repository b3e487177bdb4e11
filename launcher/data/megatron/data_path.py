"""What `data_path` means: prefixes of datasets, with or without weights. Standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BlendSpec:
    """The datasets of a `data_path`."""

    prefixes: list[str]
    weights: list[float] | None
    """As written; None: without weights."""


def parse_data_path(value: str | Sequence[str | float], key: str = "data_path") -> BlendSpec:
    """The datasets of a list `[weight, prefix, weight, prefix, ...]` or `[prefix, prefix, ...]`; a
    text is one prefix.

    Raises UserError, which names `key`, where only some have weights, or no weight is above 0.
    """
    words = [str(word).strip() for word in ([value] if isinstance(value, str) else value)]
    if not words:
        raise _wrong(key, value, "it has at least one dataset")
    firsts = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(number is None for number in firsts):
        return BlendSpec(prefixes=words, weights=None)
    if any(number is None for number in firsts):
        raise _wrong(key, value, "either every dataset has a weight before it, or none has")
    weights = [number for number in firsts if number is not None]
    if any(not 0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise _wrong(key, value, "weights are at least 0, and one is above 0")
    return BlendSpec(prefixes=words[1::2], weights=weights)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _wrong(key: str, value: str | Sequence[str | float], rule: str) -> UserError:
    written = value if isinstance(value, str) else list(value)
    return UserError(
        f"{key} = {written!r}",
        rule=rule,
        nearest="Nearest: [0.3, corpus/a_text_document, 0.7, corpus/b_text_document]",
    )
