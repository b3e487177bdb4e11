"""Non-finite numbers in JSON, as transformers writes them: `{"__float__": "Infinity"}`."""

from __future__ import annotations

import math
from typing import Any

_TAG = "__float__"
_VALUES = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def plain_floats(content: Any) -> Any:
    """`content` of a JSON file with such maps replaced by floats."""
    if isinstance(content, dict):
        if content.keys() == {_TAG} and str(content[_TAG]) in _VALUES:
            return _VALUES[str(content[_TAG])]
        return {key: plain_floats(value) for key, value in content.items()}
    return [plain_floats(value) for value in content] if isinstance(content, list) else content


def tagged_floats(content: Any) -> Any:
    """The inverse, before `content` is written as JSON."""
    if isinstance(content, float) and not math.isfinite(content):
        return {_TAG: "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"}
    if isinstance(content, dict):
        return {key: tagged_floats(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [tagged_floats(item) for item in content]
    return content
