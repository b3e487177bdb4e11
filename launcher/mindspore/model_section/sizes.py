"""Sizes: the width of the MLP, positions, and the sizes that only MindFormers names.

Owns the rule by which MindFormers derives the width of an MLP, and the positions of its older
classes, which follow from `seq_length`.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section.experts import as_integer
from launcher.mindspore.model_section.keys import ModelKeys, is_neutral
from models.checks import is_integer, is_number

_SPELLINGS = {
    "padded_vocab_size": "vocab_size", "multi_query_group_num": "num_key_value_heads",
    "sigma": "initializer_range",
}  # fmt: skip
"""Names that only some classes of MindFormers have -> key of config.json."""

KEYS = (
    *("multi_query_attention", "mean", "embedding_size", "multiple_of", "ffn_dim_multiplier"),
    *_SPELLINGS,
)


def mlp_width(hidden_size: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of the gated MLP of MindFormers' LlamaConfig: two thirds of four hidden sizes,
    enlarged by the multiplier, and rounded up to a multiple."""
    width = 4 * hidden_size
    if multiplier is not None:
        width = int((multiplier + 0.01) * width)
    width = int(2 * width / 3)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def rename(keys: ModelKeys) -> None:
    """Give the sizes that only some classes name their names in config.json."""
    _query_groups(keys)
    for name, key in _SPELLINGS.items():
        if keys.has(name) and not keys.is_own(name):
            keys.rename(name, key)


def translate(keys: ModelKeys) -> None:
    """Translate the keys about sizes."""
    if keys.has("mean"):
        _zero(keys, "mean", "weights are drawn around zero")
    _embedding_size(keys)
    _mlp(keys)
    _positions(keys)


def _query_groups(keys: ModelKeys) -> None:
    """ChatGLM: `multi_query_group_num` counts only with `multi_query_attention`."""
    if keys.is_own("multi_query_attention") or not keys.has("multi_query_attention"):
        return
    if not keys.value("multi_query_attention"):
        heads = keys.size("num_attention_heads")
        keys.replace("multi_query_attention", {"num_key_value_heads": heads},
                     "every head has its own keys and values")  # fmt: skip
        keys.drop("multi_query_group_num", "multi_query_attention is off")
    else:
        keys.drop("multi_query_attention", "num_key_value_heads has the number")


def _zero(keys: ModelKeys, name: str, why: str) -> None:
    if is_neutral(keys.value(name)):
        keys.drop(name, why)
    else:
        keys.refuse(name, why, nearest="Nearest: 0.0")


def _embedding_size(keys: ModelKeys) -> None:
    """A leftover of ChatGLM's files, where no embedding of another width exists."""
    if keys.has("embedding_size") and not keys.is_own("embedding_size"):
        keys.drop("embedding_size", "the embedding has hidden_size")


def _mlp(keys: ModelKeys) -> None:
    """`multiple_of` and `ffn_dim_multiplier` where no width is written."""
    names = [name for name in ("multiple_of", "ffn_dim_multiplier") if keys.has(name)]
    if not names and not (keys.is_legacy and _derives_width(keys)):
        return
    if keys.spelling("intermediate_size") or keys.config_json.get("intermediate_size"):
        for name in names:
            keys.drop(name, "intermediate_size is used")
        return
    hidden, multiple = keys.size("hidden_size", 4096), keys.value("multiple_of", 256)
    multiplier = keys.value("ffn_dim_multiplier")
    if not is_integer(as_integer(multiple)):
        keys.refuse("multiple_of", "must be an integer of at least 1", nearest="Nearest: 256")
    elif multiplier is not None and not (is_number(multiplier) and multiplier > 0):
        keys.refuse("ffn_dim_multiplier", "must be a number above 0", nearest="Nearest: 1.0")
    elif is_integer(hidden):
        width = mlp_width(hidden, as_integer(multiple) or 256, multiplier)
        for name in names:
            keys.replace(name, {"intermediate_size": width}, "the width of the MLP follows from it")
        keys.imply("intermediate_size", width, "type")


def _derives_width(keys: ModelKeys) -> bool:
    return keys.family in ("llama", "qwen2", "mixtral", "qwen2_moe", "telechat")


def _positions(keys: ModelKeys) -> None:
    """The older classes have as many positions as `seq_length`, if nothing is written."""
    length = keys.value("seq_length")
    if not keys.is_legacy or not is_integer(length):
        return
    written = keys.spelling("max_position_embeddings")
    positions: Any = keys.value(written) if written else None
    if positions is None:
        keys.imply("max_position_embeddings", length, "seq_length")
    elif is_integer(positions) and positions < length and not keys.trains:
        keys.replace(written, {"max_position_embeddings": length}, "seq_length is larger")
