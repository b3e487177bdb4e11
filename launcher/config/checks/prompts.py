"""Rules about the prompts of predict and the chat: what is written in the configuration itself.

Files of prompts are read, and checked, when the run starts.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.chat_template import NO_TEMPLATE
from launcher.config.checks.check import Check
from launcher.config.prompt_text import looks_like_messages, parse_messages
from launcher.config.provenance import KeyProblem
from launcher.json_text import NotJson, line_and_column

PREDICTS = ("predict", "predict_with_train_model")


def messages(check: Check) -> Iterator[KeyProblem]:
    """A prompt that begins like messages is valid JSON."""
    given = check.config.input_data
    for text in [given] if isinstance(given, str) else given or ():
        if not looks_like_messages(text):
            continue
        try:
            parse_messages(text)
        except NotJson as error:
            yield check.wrong(
                "input_data",
                "messages are JSON, with double quotes",
                what=f"input_data is not valid JSON: {error.reason}",
                nearest=_place(text, error.position),
                advice='Write [{"role": "user", "content": "..."}]; a text that begins like this '
                "is read from a file of prompts (.txt)",
            )


def _place(text: str, position: int | None) -> str:
    if position is None:
        return ""
    line, column = line_and_column(text, position)
    where = f"Line {line}, column" if line > 1 else "Column"
    before, after = text[max(0, position - 20) : position], text[position : position + 10]
    return f"{where} {column}: after {before!r}, at {after!r}"


def chat(check: Check) -> Iterator[KeyProblem]:
    """A chat is a prediction, and a system prompt is rendered with a template."""
    config = check.config
    if config.interactive and check.mode and check.mode not in PREDICTS:
        yield check.wrong(
            "interactive",
            f"run_mode is {check.mode}, and a chat is a prediction",
            nearest="Nearest: run_mode predict",
            also=("run_mode",),
        )
    is_raw = (config.chat_template or "").strip().lower() == NO_TEMPLATE
    if config.system is not None and is_raw and check.mode in PREDICTS:
        yield check.wrong(
            "system",
            "chat_template is none, and a system prompt is rendered with a chat template",
            advice="Remove one of the two",
            also=("chat_template",),
        )
