"""When the text of a prompt is JSON: messages, or a record with them.

Owns that decision, which the command line, the rules and predict need. Nothing is read here.
"""

from __future__ import annotations

import re
from typing import Any

from launcher.json_text import STRICT, parse

_BEGINNING = re.compile(
    r"""\s*(?:\[\s*\{\s*["']
    |\{\s*["'](?:messages|conversations|prompt|system|tools|role)["']\s*:
    |\{\s*["']\w+["']\s*:\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:)""",
    re.VERBOSE,
)
"""Of a list of objects, or of an object with a field of prompts, or with turns in another field.
Single quotes and another field are mistakes that are reported, not texts."""


def looks_like_messages(text: str) -> bool:
    """Whether a prompt is read as JSON and not as text."""
    return _BEGINNING.match(text) is not None


def parse_messages(text: str) -> Any:
    """The JSON value of a prompt. Raises NotJson."""
    return parse(text, STRICT)
