"""What a value of `chat_template` is (a name, a file, Jinja itself, or none), and whether a
training renders conversations with a template.

Owns these decisions, which the rules, the data and prediction need. Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from launcher.config.schema import CONVERSATION_LOADERS

NO_TEMPLATE = "none"
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")

RESERVED_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "conversations", "tools", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        "sanitize_control_tokens",
    }
)
"""Arguments of `apply_chat_template` that are not those of a template, or have a place of their
own."""

Kind = Literal["tokenizer", "none", "inline", "file", "name"]


def kind_of_template(value: str | None) -> Kind:
    """The kind of a value of `chat_template`; `tokenizer` where it is not set.

    Text with `{{` or `{%` is Jinja; a path has a separator, an ending of TEMPLATE_SUFFIXES, or is
    that of a file.
    """
    if value is None:
        return "tokenizer"
    if value.strip().lower() == NO_TEMPLATE:
        return "none"
    if "{{" in value or "{%" in value or "\n" in value:
        return "inline"
    is_path = "/" in value or value.lower().endswith(TEMPLATE_SUFFIXES) or Path(value).is_file()
    return "file" if is_path else "name"


def trains_on_conversations(configuration: Mapping[str, Any]) -> bool:
    """Whether a run of this configuration (dotted key to value, as `launcher.config.flat`) is
    trained on conversations that a chat template renders."""
    return any(
        key.startswith("train_dataset.data_loader.") and key.endswith(".type")
        and value in CONVERSATION_LOADERS
        and not configuration.get(f"{key.removesuffix('type')}prompt_template")
        for key, value in configuration.items()
    )  # fmt: skip
