"""The maximum length of a row: the number of positions of a model.

Owns which key of config.json holds it, for every family, and how rope scaling extends it. Pure
functions over plain dictionaries; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config_class import config_class
from models.module_table import LEARNED_POSITIONS

_MOST = 2**53  # limit of a plausible number of tokens
_STRETCHING = ("linear", "yarn", "llama3", "longrope")
"""Kinds of rope scaling that multiply positions by their factor."""

DEFAULT_ROW = 2048
"""Default tokens of a row, if the model has as many positions."""

_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
    "model_max_length", "max_target_positions", "n_ctx", "context_length",
)  # fmt: skip
"""Names of the number of positions; only those of the family's configuration class count."""


@dataclass(frozen=True, kw_only=True)
class PositionLimit:
    """The positions of a model."""

    key: str
    """The key of config.json with their number, as spelled by the family."""
    positions: int
    """Its value."""
    longest_row: int | None
    """Maximum tokens of a row; None with dynamic rope scaling."""
    unscaled_row: int
    """Maximum tokens of a row without rope scaling."""

    def __str__(self) -> str:
        same = self.longest_row in (None, self.positions)
        return self.key if same else f"{self.key} = {self.positions}"


def position_limit(family: str, hf_config: Mapping[str, Any]) -> PositionLimit | None:
    """The positions of a model, from its config.json; None if its rows are not limited."""
    key, positions = _number_of_positions(family, hf_config)
    if not isinstance(positions, int) or positions < 1:
        return None
    longest: int | None = positions
    if family in LEARNED_POSITIONS:
        longest = unscaled = max(positions - _reserved(family, hf_config), 1)
    else:
        unscaled, longest = positions, stretched(positions, _rope(hf_config))
    return PositionLimit(key=key, positions=positions, longest_row=longest, unscaled_row=unscaled)


def row_length(family: str, hf_config: Mapping[str, Any]) -> int:
    """Default tokens of a row."""
    limit = position_limit(family, hf_config)
    return DEFAULT_ROW if limit is None else min(limit.unscaled_row, DEFAULT_ROW)


def stretched(positions: int, rope: Mapping[str, Any]) -> int | None:
    """Maximum tokens of a row with rope settings, shared or by layer type; None: not limited."""
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
    longest = [_stretched_by(positions, kind) for kind in kinds]
    return None if None in longest else max(row for row in longest if row is not None)


def _stretched_by(positions: int, rope: Mapping[str, Any]) -> int | None:
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind == "dynamic":
        return None
    original = rope.get("original_max_position_embeddings") if kind != "linear" else None
    before, factor = _number(original or positions), _number(factor)
    if kind not in _STRETCHING or before is None or factor is None:
        return positions
    return max(positions, int(before * factor))


def _number(value: Any) -> float | None:
    """A plausible number of tokens; None for everything else."""
    return value if isinstance(value, int | float) and abs(value) < _MOST else None


def _rope(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters")
    return rope if isinstance(rope, Mapping) else {}


def _number_of_positions(family: str, hf_config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key and its value: that of config.json, else the default of the configuration class."""
    known = config_class(family)
    if known is None:
        key = next((key for key in _KEYS if key in hf_config), _KEYS[0])
        return key, hf_config.get(key)
    key = next((known.key(key) for key in _KEYS if known.has(key)), "")
    names = known.names_of(key)
    written = [name for name in names if hf_config.get(name) is not None]
    return (written[0], hf_config[written[0]]) if written else (key, known.default(key))


def _reserved(family: str, hf_config: Mapping[str, Any]) -> int:
    """Number of unused entries of the position embedding."""
    reserved = LEARNED_POSITIONS[family]
    if reserved is not None:
        return reserved
    known = config_class(family)
    padding = hf_config.get("pad_token_id", known.default("pad_token_id") if known else None)
    return padding + 1 if isinstance(padding, int) else 1
