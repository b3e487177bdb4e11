"""Which table of names weights have: by their keys, never by the name of a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from launcher.mindspore.naming import chatglm, legacy_deepseek, llama, mcore, telechat
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.rule import Rule
from launcher.mindspore.naming.sizes import Sizes

Table = Callable[[Sizes, Orders], Iterator[Rule]]


@dataclass(frozen=True)
class Naming:
    """The names of one kind of network, for the families that it exists for."""

    name: str
    keys: re.Pattern[str]
    """What a tensor with such a name is called."""
    tables: Mapping[str, Table]
    """`model_type` of config.json to the table."""


LEGACY = Naming(
    "legacy",
    re.compile(r"model\.tok_embeddings\.embedding_weight|"
               r"model\.layers\.\d+\.(attention\.(w|l|q2|kv2)|feed_forward\.)"),
    {
        "llama": llama.rules, "mistral": llama.rules, "qwen2": llama.rules,
        "mixtral": llama.rules, "qwen2_moe": llama.rules,
        "deepseek_v3": legacy_deepseek.rules, "telechat": telechat.rules,
    },
)  # fmt: skip
CHATGLM = Naming(
    "legacy",
    re.compile(r"transformer\.embedding\.embedding_weight|"
               r"transformer\.encoder\.layers\.\d+\.(self_attention\.w|mlp\.dense_(left|right))"),
    {"chatglm": chatglm.rules, "glm": chatglm.glm_rules},
)  # fmt: skip
OWN_CHATGLM = Naming(
    "chatglm",
    re.compile(r"transformer\.(embedding\.word_embeddings\.weight|"
               r"encoder\.layers\.\d+\.self_attention\.query_key_value\.)"),
    {"glm": chatglm.glm_rules},
)  # fmt: skip
"""Of the model's own code, which is not MindFormers': for the class `glm` of transformers."""
MCORE = Naming(
    "mcore",
    re.compile(r"embedding\.word_embeddings\.weight|"
               r"(decoder\.layers\.\d+|mtp\.layers\.\d+\.transformer_layer)\.self_attention\.linear_"),
    dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"), mcore.rules),
)  # fmt: skip
NAMINGS = (LEGACY, CHATGLM, MCORE, OWN_CHATGLM)
WRITTEN = {"legacy": (LEGACY, CHATGLM), "mcore": (MCORE,), "mcore_1.6": (MCORE,)}
"""Name of a naming to those that can be written under it."""


def naming_of(names: Iterable[str]) -> Naming | None:
    """The naming of tensors with these names; None for others."""
    known = list(names)
    for naming in NAMINGS:
        if any(map(naming.keys.match, known)):
            return naming
    return None


def written_table(naming: str, family: str) -> Table | None:
    """The table by which weights of a family are written; None without one."""
    tables = (found.tables.get(family) for found in WRITTEN[naming])
    return next((table for table in tables if table is not None), None)


def families_of(naming: str) -> list[str]:
    """The families that can be written under a naming."""
    return sorted({family for found in WRITTEN[naming] for family in found.tables})
