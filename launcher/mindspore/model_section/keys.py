"""What a configuration writes in `model.model_config`, while it is translated.

Owns how a key is read (texts of the command line parsed, the word "None" as null), what is known
of the model around it (family, config.json, mode), and the methods that change one key. Invariant:
a key that the configuration class of the family has itself is no key of MindFormers (`is_own`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.config.derived import read_json_object
from launcher.config.draft import Draft
from launcher.config.key_checks import plain_value
from launcher.config.nodes import Node
from launcher.errors import UserError
from models.config_class import ConfigClass, config_class
from models.families import DECODERS
from models.keys import ALIASES, GENERAL, ROPE

SECTION = "model.model_config"
_WORDS_FOR_NULL = ("none", "null", "")


def is_null(value: Any) -> bool:
    """Whether a value asks for nothing: null, or one of the words for it."""
    return value is None or (isinstance(value, str) and value.lower() in _WORDS_FOR_NULL)


def is_neutral(value: Any) -> bool:
    """Whether the value of a switch or a number asks for nothing."""
    return is_null(value) or value in (0, False) or value in ([], {})


def value_of(node: Node | None) -> Any:
    """The plain value of a node; None without one, and for the words for null."""
    value = None if node is None else plain_value(node)
    return None if is_null(value) else value


@dataclass
class ModelKeys:
    """The keys of the section, and what is known of the model."""

    draft: Draft
    family: str = ""
    """The model_type; empty as long as it is not known."""
    config_json: Mapping[str, Any] = field(default_factory=dict)
    """Of pretrained_model_dir; empty without one."""
    is_legacy: bool = False
    """Whether the model is that of an older class of MindFormers, without a config.json."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The defaults of that class, in keys of config.json."""

    def names(self) -> list[str]:
        """The keys that are written, in order."""
        node = self.draft.find(SECTION)
        return list(node.value) if node is not None and isinstance(node.value, dict) else []

    def has(self, name: str) -> bool:
        """Whether a key is written, be it as null."""
        return self.draft.find(f"{SECTION}.{name}") is not None

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a key; `default` where it is null or not written."""
        value = value_of(self.draft.find(f"{SECTION}.{name}"))
        return default if value is None else value

    def spelling(self, name: str) -> str:
        """The spelling of a key of config.json that is written with a value; else empty."""
        return next((key for key in spellings(name) if self.value(key) is not None), "")

    def size(self, name: str, default: Any = None) -> Any:
        """The value of a key of config.json by any of its spellings, else that of config.json."""
        written = self.spelling(name)
        found = self.value(written) if written else self.config_json.get(name)
        return default if found is None else found

    def is_own(self, name: str) -> bool:
        """Whether config.json of the family has a key of this name that may have several values."""
        own = DECODERS.get(self.family)
        own = own and (own.with_experts or own)
        if own is not None:
            return name in (own.own_keys | GENERAL | ROPE) - own.fixed.keys()
        return self.known is not None and self.known.has(name)

    @property
    def known(self) -> ConfigClass | None:
        """The configuration class of a family that runs through its transformers module."""
        return config_class(self.family) if self.family and self.family not in DECODERS else None

    @property
    def is_llama_like(self) -> bool:
        """Whether the family, if it is known, has RMS norms, rotary embeddings and gated MLPs, as
        every family of MindFormers has."""
        return self.family in (*DECODERS, "qwen2_moe", "")

    @property
    def expert_count(self) -> str:
        """The key of the number of experts; empty for a family without experts."""
        own = DECODERS.get(self.family)
        own = own and (own.with_experts or own)
        if own is not None:
            return own.expert_count or ""
        counts = ("num_experts", "num_local_experts", "n_routed_experts")
        return next((key for key in counts if self.is_own(key)), "")

    @property
    def trains(self) -> bool:
        """Whether the run trains: what matters to a loss matters."""
        mode = value_of(self.draft.find("run_mode"))
        return mode in ("train", "finetune", "resume")

    def drop(self, name: str, why: str) -> None:
        """Remove a key that has no effect."""
        self.draft.drop(f"{SECTION}.{name}", why)

    def replace(self, name: str, values: Mapping[str, Any], why: str = "") -> None:
        """Replace a key by others of this section with these values."""
        self.draft.replace(
            f"{SECTION}.{name}", {f"{SECTION}.{key}": value for key, value in values.items()}, why
        )

    def rename(self, name: str, new: str, why: str = "") -> None:
        """Move a key to another name of this section."""
        self.draft.rename(f"{SECTION}.{name}", f"{SECTION}.{new}", why)

    def imply(self, name: str, value: Any, source: str) -> None:
        """Write a key where no spelling of it is written, at the place of the key `source`."""
        if not any(self.has(key) for key in spellings(name)):
            self.draft.imply(f"{SECTION}.{name}", value, f"{SECTION}.{source}")

    def refuse(self, name: str, rule: str, *, nearest: str = "", advice: str = "") -> None:
        """Add a problem with the value of a key."""
        self.draft.refuse(f"{SECTION}.{name}", rule, nearest=nearest, advice=advice)


def spellings(name: str) -> Iterator[str]:
    """The names in YAML of a key of config.json, its own first."""
    yield name
    yield from (alias for alias, key in ALIASES.items() if key == name)


def config_json_of(draft: Draft) -> dict[str, Any]:
    """config.json of pretrained_model_dir; empty where it cannot be read, which a rule reports."""
    folder = value_of(draft.find("pretrained_model_dir"))
    path = Path(folder, "config.json") if isinstance(folder, str) and "\0" not in folder else None
    try:
        return read_json_object(path) if path is not None and path.is_file() else {}
    except (UserError, OSError, ValueError):
        return {}
