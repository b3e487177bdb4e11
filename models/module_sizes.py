"""Checks of the sizes of a transformers module that mean the same in all families.

Owns the rules whose violation a module would report only in its first forward pass, or with an
obscure error in its construction. Lists of one value a layer are left to the module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.checks import is_integer, nearest
from models.config_class import ConfigClass
from models.reading import Reading
from models.spec import Problems

_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")


class ModuleSizes:
    """Checks config.json of a module, and collects problems."""

    def __init__(
        self, config: Mapping[str, Any], known: ConfigClass, reading: Reading, problems: Problems
    ) -> None:
        self._config, self._known = config, known
        self._reading, self._problems = reading, problems

    def run(self) -> None:
        """Counts are integers of at least 1; KV heads divide the heads; top-k fits the experts."""
        before = len(self._problems)
        for name in _COUNTS:
            _, value = self._value(name)
            if value is not None and not isinstance(value, list) and not is_integer(value):
                self._add(name, "must be an integer of at least 1")
        if len(self._problems) == before:
            self._heads()
            self._top_k()

    def _heads(self) -> None:
        _, heads = self._value("num_attention_heads")
        _, groups = self._value("num_key_value_heads")
        if is_integer(heads) and is_integer(groups) and heads % groups:
            divisors = [size for size in range(1, heads + 1) if heads % size == 0]
            near = sorted(divisors, key=lambda size: abs(size - groups))[:2]
            rule = f"does not divide {heads} attention heads"
            self._add("num_key_value_heads", rule, nearest(*sorted(near)))

    def _top_k(self) -> None:
        for name in _TOP_K:
            _, top_k = self._value(name)
            counts = {key: value for key, value in map(self._value, _EXPERTS) if is_integer(value)}
            experts = next(iter(counts.values())) if len(counts) == 1 else None
            if experts and is_integer(top_k) and top_k > experts:
                self._add(name, f"there are {experts} experts", f"Nearest: {experts}")

    def _value(self, name: str) -> tuple[str, Any]:
        """(key in config.json, value) of a key by any of its names; None as value if missing."""
        for key in self._known.names_of(name):
            if self._config.get(key) is not None and self._known.has(key):
                return key, self._config[key]
        return name, None

    def _add(self, name: str, rule: str, near: str = "") -> None:
        key, value = self._value(name)
        written = self._reading.written.get(key)
        what = f"model.model_config.{written}" if written else f"config.json: {key}"
        self._problems.log(f"{what} = {value!r}", rule, nearest=near, key=written or "")
