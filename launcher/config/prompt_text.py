"""When the text of a prompt is JSON: messages, or a record with them.

Owns that decision, which the command line, the rules and predict need. Nothing is read here.
"""

from __future__ import annotations

import re
from typing import Any

from launcher.json_text import STRICT, parse

_BEGINNING = re.compile(
    r"""\s*(?:\[\s*\{\s*["']|\{\s*["'](?:messages|conversations|prompt|system|tools)["']\s*:)"""
)
"""Of a list of objects, or of an object with a field of prompts. Single quotes are a mistake that
is reported, not a text."""


def looks_like_messages(text: str) -> bool:
    """Whether a prompt is read as JSON and not as text."""
    return _BEGINNING.match(text) is not None


def parse_messages(text: str) -> Any:
    """The JSON value of a prompt. Raises NotJson."""
    return parse(text, STRICT)
