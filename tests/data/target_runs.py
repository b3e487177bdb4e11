"""The target tokens of a conversation, for tests of where answers begin and end."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from launcher.data.chat import tokenize_conversations
from launcher.data.conversations import Conversation


def target_runs(tokenizer: Any, turns: list[dict[str, Any]]) -> list[list[int]]:
    """The runs of target tokens of one conversation, under the tokenizer's chat template."""
    return runs_of_talk(tokenizer, Conversation(where="d.jsonl:1", messages=turns))


def runs_of_talk(tokenizer: Any, talk: Conversation) -> list[list[int]]:
    """The runs of target tokens of a conversation."""
    ((sample,),) = tokenize_conversations([talk], tokenizer, lambda _: None)
    pairs = zip(sample.is_target, sample.tokens, strict=True)
    runs = groupby(pairs, key=lambda pair: bool(pair[0]))
    return [[token for _, token in run] for is_target, run in runs if is_target]
