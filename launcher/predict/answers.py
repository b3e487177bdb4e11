"""The answer of a model as a message: its content, and the thoughts before it.

Owns the marks by which models set thoughts apart. A template that mentions a mark uses it; the
field of the thoughts is the one that the template reads back (`reasoning_content` for most).

Sources: the chat templates of Qwen3, DeepSeek-R1 and GLM-4.5 (`<think>`), Magistral (`[THINK]`),
Seed-OSS (`<seed:think>`), and the harmony format of gpt-oss (channels).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from launcher.data.conversations import Conversation, Turn
from launcher.data.templates import THOUGHTS, ChatTemplate
from launcher.predict.text_stream import REPLACEMENT

_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>(?P<name>\w+)[^<]*<\|message\|>"
    r"(?P<text>.*?)(?=<\|end\|>|<\|return\|>|<\|call\|>|<\|start\|>|\Z)",
    re.DOTALL,
)
"""A message of harmony: the channel `analysis` has the thoughts, `final` the answer."""


def answer_message(tokenizer: Any, template: ChatTemplate, prompt: str, tokens: list[int]) -> Turn:
    """The new tokens of an answer as a message of the assistant.

    `prompt`: the rendered text before it, at whose end thoughts may already have begun.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    thoughts, content = split_thoughts(text, template.text, prompt)
    message: Turn = {"role": "assistant", "content": _plain(content, template)}
    if thoughts is not None:
        message[template.thoughts_name or THOUGHTS[0]] = _plain(thoughts, template)
    return message


def with_answer(conversation: Conversation, answer: Turn) -> Conversation:
    """The conversation with an answer at its end; an answer that was begun there is continued."""
    turns = conversation.messages
    if turns and turns[-1]["role"] == "assistant":
        begun = turns[-1]
        last = {**begun, **answer, "content": begun["content"] + answer["content"]}
        return replace(conversation, messages=[*turns[:-1], last])
    return replace(conversation, messages=[*turns, answer])


def split_thoughts(text: str, template: str, prompt: str = "") -> tuple[str | None, str]:
    """(thoughts, answer) of a text; the thoughts are None where there are none.

    `template`: the Jinja text, which mentions the marks. Thoughts that were cut off have no answer
    behind them.
    """
    if "<|channel|>" in template:
        return _of_channels(text)
    begin, end = next((marks for marks in _MARKS if marks[1] in template), ("", ""))
    if not end:
        return None, text
    is_inside = prompt.rstrip().endswith(begin)
    head, mark, rest = text.partition(begin)
    if mark and not head.strip():
        thoughts, answer = rest, ""
    elif is_inside:
        thoughts, answer = text, ""
    else:
        return None, text
    thoughts, mark, answer = thoughts.partition(end)
    thoughts = thoughts.strip()
    return (thoughts or None), (answer.lstrip("\n") if mark else "")


def _of_channels(text: str) -> tuple[str | None, str]:
    found = [(match["name"], match["text"]) for match in _CHANNEL.finditer(text)]
    if not found:
        return None, text
    thoughts = "\n".join(part for name, part in found if name == "analysis")
    return thoughts or None, "".join(part for name, part in found if name != "analysis")


def _plain(text: str, template: ChatTemplate) -> str:
    """A text without special tokens, and without half a character at its end."""
    for token in template.special_tokens:
        text = text.replace(token, "")
    return text.rstrip(REPLACEMENT)
