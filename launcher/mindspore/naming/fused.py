"""Rows of fused projections: query, key and value in one matrix, gate and up in one matrix.

Which of the orders a file has cannot be seen in it; `orders` chooses. Plain orders of a run with
tensor parallelism are plain within each of its ranks: `blocks` is their number.
"""

from __future__ import annotations

from launcher.mindspore.naming.rule import Geometry, Rows, by_rows, per
from launcher.mindspore.naming.sizes import Sizes

Pairs = list[list[tuple[Rows, Rows]]]


def _head(sizes: Sizes, rows: int) -> int:
    """Rows of a head, in a matrix with the rows of all query, key and value heads."""
    return per(rows, sizes.heads + 2 * sizes.groups, "the heads of query, key and value")


def _by_group(sizes: Sizes, rows: int) -> Pairs:
    """For each key/value group: its query heads, its key head, its value head."""
    head, groups = _head(sizes, rows), sizes.groups
    query = sizes.group_heads * head
    fused, single = Rows(groups, query + 2 * head), Rows(groups, head)
    return [
        [(Rows(groups, query), fused[:, :query])],
        [(single, fused[:, query : query + head])],
        [(single, fused[:, query + head :])],
    ]


def _plain(blocks: int) -> Geometry:
    def pairs(sizes: Sizes, rows: int) -> Pairs:
        """In each block all query heads, all key heads, all value heads."""
        head = _head(sizes, rows)
        query = per(sizes.heads, blocks, "the tensor parallel ranks") * head
        single = per(sizes.groups, blocks, "the tensor parallel ranks") * head
        fused, of_groups = Rows(blocks, query + 2 * single), Rows(blocks, single)
        return [
            [(Rows(blocks, query), fused[:, :query])],
            [(of_groups, fused[:, query : query + single])],
            [(of_groups, fused[:, query + single :])],
        ]

    return by_rows(pairs)


def qkv(order: str, blocks: int = 1) -> Geometry:
    """Query, key and value in the order `group` or `plain`."""
    return by_rows(_by_group) if order == "group" else _plain(blocks)


def gate_up(order: str, blocks: int = 1) -> Geometry:
    """Gate and up: `pair` has row j of gate and row j of up next to each other."""

    def pairs(sizes: Sizes, rows: int) -> Pairs:
        width = per(rows, 2, "gate and up")
        if order == "pair":
            single, fused = Rows(width, 1), Rows(width, 2)
            return [[(single, fused[:, :1])], [(single, fused[:, 1:])]]
        half = per(width, blocks, "the tensor parallel ranks")
        single, fused = Rows(blocks, half), Rows(blocks, 2 * half)
        return [[(single, fused[:, :half])], [(single, fused[:, half:])]]

    return by_rows(pairs)


def query_with_pairs(blocks: int) -> Geometry:
    """Query, and key and value stored together (TeleChat2: the rows of a key head, then those of
    its value head), as plain query, key, value."""

    def pairs(sizes: Sizes, rows: int) -> Pairs:
        head = _head(sizes, rows)
        queries = per(sizes.heads, blocks, "the tensor parallel ranks")
        groups = per(sizes.groups, blocks, "the tensor parallel ranks")
        fused = Rows(blocks, queries + 2 * groups, head)
        both = Rows(blocks, groups, 2 * head)
        return [
            [(Rows(blocks, queries, head), fused[:, :queries, :])],
            [
                (both[:, :, :head], fused[:, queries : queries + groups, :]),
                (both[:, :, head:], fused[:, queries + groups :, :]),
            ],
        ]

    return by_rows(pairs)
