"""Rows of projections that MindFormers splits: heads without and with rotary embedding, latent
parts, and the fused projection of chatglm.

Where its network rotates the first half of a head against the second, the rows of neighbouring
pairs are stored as even rows, then odd rows.
"""

from __future__ import annotations

from collections.abc import Callable

from launcher.mindspore.naming.rule import Geometry, Rows, by_rows, per
from launcher.mindspore.naming.sizes import Sizes

Number = Callable[[Sizes], int]


def part_of_heads(first: Number, count: Number, head: Number) -> Geometry:
    """`count` rows from `first` on of each head of `head` rows."""

    def pairs(sizes: Sizes, rows: int) -> list[list[tuple[Rows, Rows]]]:
        heads = per(rows, count(sizes), "the rows of a head")
        start = first(sizes)
        found = Rows(heads, head(sizes))[:, start : start + count(sizes)]
        return [[(found, Rows(heads, count(sizes)))]]

    return by_rows(pairs, lambda sizes, rows: per(rows[0], head(sizes), "a head") * count(sizes))


def rotary_of_heads(first: Number, count: Number, head: Number) -> Geometry:
    """As `part_of_heads`; of each head the even rows come first, then the odd ones."""

    def pairs(sizes: Sizes, rows: int) -> list[list[tuple[Rows, Rows]]]:
        heads, start = per(rows, count(sizes), "the rows of a head"), first(sizes)
        stop, half = start + count(sizes), per(count(sizes), 2, "a pair of rows")
        found, stored = Rows(heads, head(sizes)), Rows(heads, count(sizes))
        return [[
            (found[:, start:stop:2], stored[:, :half]),
            (found[:, start + 1 : stop : 2], stored[:, half:]),
        ]]  # fmt: skip

    return by_rows(pairs, lambda sizes, rows: per(rows[0], head(sizes), "a head") * count(sizes))


def part_of_rows(first: Number, count: Number, total: Number) -> Geometry:
    """`count` rows from `first` on."""

    def pairs(sizes: Sizes, rows: int) -> list[list[tuple[Rows, Rows]]]:
        start = first(sizes)
        return [[(Rows(total(sizes))[start : start + count(sizes)], Rows(count(sizes)))]]

    return by_rows(pairs, lambda sizes, rows: count(sizes))


def concatenated(*counts: Number) -> Geometry:
    """Several tensors, the rows of one after those of the other."""

    def pairs(sizes: Sizes, rows: int) -> list[list[tuple[Rows, Rows]]]:
        result, start = [], 0
        for count in counts:
            stop = start + count(sizes)
            result.append([(Rows(count(sizes)), Rows(rows)[start:stop])])
            start = stop
        if start != rows:
            raise ValueError(f"it has {rows} rows, not {start}")
        return result

    return by_rows(pairs)
