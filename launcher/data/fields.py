"""What each field of a conversation record does: one table for each format.

Owns the names. A field of a record is read (`RECORD_FIELDS`, `TURN_FIELDS`), is known metadata
(`METADATA`), decides whether an answer counts for the loss (`WEIGHTS`), or belongs to another kind
of data (`OTHER_DATA`). Any other field is not used, and is counted under its name.

Sources: LLaMA-Factory (alpaca and sharegpt with `system`, `history`, `tools`, `images`, `kto_tag`),
the chat format of OpenAI (`tool_calls`, `weight`, parts of content), axolotl (`train`), ms-swift
(`loss`), TRL (`chosen`, `rejected`, `label`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.config.schema.data import CHAT_ROLES

TEMPLATE_KWARGS = "chat_template_kwargs"
"""Arguments of the chat template, for one record."""

_OF_EACH = ("system", "tools", TEMPLATE_KWARGS)
RECORD_FIELDS = {
    "alpaca": frozenset({"instruction", "input", "output", "history", "text", *_OF_EACH}),
    "messages": frozenset({"messages", *_OF_EACH}),
    "sharegpt": frozenset({"conversations", *_OF_EACH}),
}
"""Fields of a record. All are read but `text` of alpaca, the formatted prompt that datasets of the
Hub repeat in each record."""

TURN_FIELDS = {
    "messages": frozenset({"role", "content"}),
    "sharegpt": frozenset({"from", "value"}),
}
"""Fields of a turn; in the messages format all others are passed to the chat template."""

METADATA = frozenset(
    {
        *("id", "_id", "idx", "index", "uid", "uuid", "guid", "hash", "prompt_id", "message_id"),
        *("conversation_id", "example_id", "sample_id", "parent_id", "row_id", "tool_call_id"),
        *("source", "sources", "dataset", "data_source", "dataset_name", "origin", "subset"),
        *("split", "url", "title", "topic", "author", "license", "version", "model", "generator"),
        *("category", "categories", "task", "task_type", "task_name", "type", "tag", "tags"),
        *("domain", "lang", "language", "difficulty", "keywords", "created", "created_at"),
        *("date", "timestamp", "updated_at", "meta", "metadata", "info", "parallel_tool_calls"),
    }
)
"""Fields that describe a record or a turn; they are no part of the conversation."""

WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss_mask", "loss", "train", "training")
"""0 or false: an answer is context; 1 or true: it counts for the loss."""

ASSISTANT_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields an answer may have instead of `content`."""

ROLES = frozenset(CHAT_ROLES)
"""Roles of the messages format."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}

_PREFERENCE = "preference data, which PreferenceDataLoader and FeedbackDataLoader read"
_MEDIA = "data with images, video or audio; only text is supported"


def _any(_: Any) -> bool:
    return True


def _is_verdict(value: Any) -> bool:
    return isinstance(value, bool) or value in (0, 1)


OTHER_DATA: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), (_PREFERENCE, _any)),
    "label": (_PREFERENCE, _is_verdict),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), (_MEDIA, _any)),
    "functions": ("the older spelling of `tools`", _any),
    "train_detail": ("not built yet: weights for parts of an answer", _any),
    "training_detail": ("not built yet: weights for parts of an answer", _any),
}
"""Fields that would change the training target: what they belong to, and which of their values
matter (an empty list or string never does)."""
