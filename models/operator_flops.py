"""Floating-point operations of our own operators, in the registry of torch's counter.

Read by `torch.utils.flop_counter`, by the choice of what is recomputed by operation, and by the
partitioner of torch.compile, to all of which an operator without a formula costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Sizes = tuple[int, ...] | torch.Size


def register_attention(operator: Any, backward: Any) -> None:
    """Count an operator of (query, key, value, ...), and that of its gradient, of (gradient, query,
    key, value, ...), as torch counts attention: every query with every key of its row. Documents
    are data, and the number is a function of shapes."""

    @register_flop_formula(operator)  # type: ignore[untyped-decorator]
    def _(query: Sizes, key: Sizes, value: Sizes, *_: Any, **__: Any) -> int:
        return _pairs(query, key) * 2 * (query[-1] + value[-1])

    @register_flop_formula(backward)  # type: ignore[untyped-decorator]
    def _(_: Sizes, query: Sizes, key: Sizes, value: Sizes, *__: Any, **___: Any) -> int:
        # Scores again, their gradient from values, and the gradients of all three.
        return _pairs(query, key) * 2 * (3 * query[-1] + 2 * value[-1])


def _pairs(query: Sizes, key: Sizes) -> int:
    rows, heads, length, _ = query
    return rows * heads * length * key[-2]
