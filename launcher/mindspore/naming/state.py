"""Optimizer state in files of MindFormers: which of it has a place here, under which name.

State of AdamW and Muon lies under the prefixes that Slipway uses; FusedAdamW has others. What other
optimizers keep (Came, averages of weights, master copies) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from launcher.mindspore.names import TRANSIENT
from launcher.weights.optimizer_state import STATE_PREFIXES

_RENAMED = {"exp_avg.": "adam_m.", "exp_avg_sq.": "adam_v."}
_CAME = re.compile(r"exp_avg_(sq_row|sq_col|insta_row|insta_col|sq)_")
_LEFT_OUT = re.compile(
    r"(max_exp_avg_sq|main_param)\.|pma_weight_|afactor_step$|\w+\.placeholder\.\d+$"
)
_NEVER_READ = (
    *TRANSIENT, "fi_accu", "tokens_per_expert", "key_cache", "value_cache", "zeros_",
)  # fmt: skip
"""Parts of names of counters and buffers of a run."""


class Sorted(NamedTuple):
    """Names in files, by what becomes of them."""

    kept: dict[str, tuple[str, str]]
    """Name to (prefix of optimizer state here, name of the parameter in the files)."""
    left_out: list[str]
    """Optimizer state that has no place here."""
    is_of_came: bool


def sorted_in(names: Iterable[str]) -> Sorted:
    """`names` of a file, without counters and buffers."""
    known = [name for name in names if not any(part in name for part in _NEVER_READ)]
    is_of_came = any(map(_CAME.match, known))
    kept, left_out = dict[str, tuple[str, str]](), []
    for name in known:
        if _CAME.match(name) or _LEFT_OUT.match(name) or (is_of_came and name.startswith("exp_")):
            left_out.append(name)
        else:
            kept[name] = _parted(name)
    return Sorted(kept, left_out, is_of_came)


def _parted(name: str) -> tuple[str, str]:
    """(prefix of optimizer state here, name of the parameter)."""
    prefix, dot, parameter = name.partition(".")
    prefix += dot
    if prefix in STATE_PREFIXES:
        return prefix, parameter
    return (_RENAMED[prefix], parameter) if prefix in _RENAMED else ("", name)
