"""The words "None" and "null" in MindFormers' files, which mean null.

Owns this one replacement. The command line knows the words itself, and a prompt is a text.
"""

from __future__ import annotations

from dataclasses import replace

from launcher.config.draft import Draft
from launcher.config.nodes import Node

_WORDS = ("None", "null")
_TEXTS = ("input_data",)
"""Keys of which any text is meant."""


def translate(draft: Draft) -> None:
    """Replace the words everywhere but in prompts; it is no change that needs a reason."""
    sections = {
        key: child if key in _TEXTS else _without_words(child)
        for key, child in draft.tree.value.items()
    }
    draft.tree = replace(draft.tree, value=sections)


def _without_words(node: Node) -> Node:
    if isinstance(node.value, dict):
        children = {key: _without_words(child) for key, child in node.value.items()}
        return replace(node, value=children)
    if isinstance(node.value, list):
        return replace(node, value=[_without_words(child) for child in node.value])
    is_word = isinstance(node.value, str) and node.value in _WORDS and not node.is_text
    return replace(node, value=None) if is_word else node
