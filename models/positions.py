"""How long a row may be for a model: where its positions end.

Owns which key of config.json says so, for every family, and what rope scaling adds to it. Pure
functions over plain dictionaries; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config_class import config_class
from models.module_table import LEARNED_POSITIONS

_MOST = 2**53  # what counts as a number of tokens
_STRETCHING = ("linear", "yarn", "llama3", "longrope")
"""Kinds of rope scaling that add positions by their factor."""

USUAL_ROW = 2048
"""Tokens of a row where nothing is written and the model has as many positions."""

_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
    "model_max_length", "max_target_positions", "n_ctx", "context_length",
)  # fmt: skip
"""Names of the number of positions; those of the family's own class count."""


@dataclass(frozen=True, kw_only=True)
class PositionLimit:
    """The positions of a model."""

    key: str
    """The key of config.json that gives their number, as the family spells it."""
    positions: int
    """Its value."""
    longest_row: int | None
    """Tokens of the longest row; None where the rotation stretches by itself."""
    usual_row: int
    """The longest row without rope scaling."""

    def __str__(self) -> str:
        same = self.longest_row in (None, self.positions)
        return self.key if same else f"{self.key} = {self.positions}"


def position_limit(family: str, hf_config: Mapping[str, Any]) -> PositionLimit | None:
    """The positions of a model, from its config.json; None where nothing limits its rows."""
    key, positions = _number_of_positions(family, hf_config)
    if not isinstance(positions, int) or positions < 1:
        return None
    longest: int | None = positions
    if family in LEARNED_POSITIONS:
        longest = usual = max(positions - _reserved(family, hf_config), 1)
    else:
        usual, longest = positions, stretched(positions, _rope(hf_config))
    return PositionLimit(key=key, positions=positions, longest_row=longest, usual_row=usual)


def row_length(family: str, hf_config: Mapping[str, Any]) -> int:
    """Tokens of a row where nobody says how many."""
    limit = position_limit(family, hf_config)
    return USUAL_ROW if limit is None else min(limit.usual_row, USUAL_ROW)


def stretched(positions: int, rope: Mapping[str, Any]) -> int | None:
    """Tokens of the longest row with rope settings, of one kind or by layer type; None: any."""
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
    """A number of a size that rows may have; None for everything else."""
    return value if isinstance(value, int | float) and abs(value) < _MOST else None


def _rope(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters")
    return rope if isinstance(rope, Mapping) else {}


def _number_of_positions(family: str, hf_config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key and its value: what config.json says, else the default of the family's class."""
    known = config_class(family)
    if known is None:
        key = next((key for key in _KEYS if key in hf_config), _KEYS[0])
        return key, hf_config.get(key)
    key = next((known.key(key) for key in _KEYS if known.has(key)), "")
    names = known.names_of(key)
    written = [name for name in names if hf_config.get(name) is not None]
    return (written[0], hf_config[written[0]]) if written else (key, known.default(key))


def _reserved(family: str, hf_config: Mapping[str, Any]) -> int:
    """Entries of the table of positions that no token has."""
    reserved = LEARNED_POSITIONS[family]
    if reserved is not None:
        return reserved
    known = config_class(family)
    padding = hf_config.get("pad_token_id", known.default("pad_token_id") if known else None)
    return padding + 1 if isinstance(padding, int) else 1
