"""Mutations: a right file made wrong in one way, by a seeded choice. For fuzz tests."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    -1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, True, False, -0.0, 0.5, 2.0, 1e300,
    float("nan"), float("inf"), None, "", "x", "F32", "é\ud800", "../x", "9" * 5000,
    [], [[]], [0] * 100, [2**62, 2**62], [-1, 1], ["2"], {}, {"x": 1}, {"shape": [1]},
)  # fmt: skip
"""What a place in a JSON tree is replaced by."""

TEXTS = (
    b"\xff", b"\x00", b"\xc3(", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"1e999", b"NaN",
    b"\\ud800", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b'"w":1,"w":2,', b" " * 4096,
)  # fmt: skip
"""What is put into a text."""


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON tree with one to three places changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [(owner, key) for owner, key in _places(tree)]
        if not places:
            return rng.choice(VALUES)
        owner, key = rng.choice(places)
        _change(rng, owner, key)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in the tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if _is_list(tree) else ()
    found = [(tree, key) for key in keys]
    for key in keys:
        found += _places(tree[key])
    return found


def _is_list(tree: Any) -> bool:
    return isinstance(tree, list)


def _change(rng: random.Random, owner: Any, key: Any) -> None:
    way = rng.randrange(5)
    value = owner[key]
    if way == 0:
        del owner[key]
    elif way == 1 and isinstance(owner, dict):
        owner[rng.choice(("", "w", f"{key}x", "__metadata__"))] = owner.pop(key)
    elif way == 2 and type(value) is int:
        owner[key] = value + rng.choice((-1, 1, 8, 2**40))
    elif way == 3 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(value))
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` with a bit flipped, a part cut out, doubled or moved, or a text put in."""
    result = bytearray(content)
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    way = rng.randrange(6)
    if way == 0:
        result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del result[last:]
    elif way == 2:
        del result[first:last]
    elif way == 3:
        result[first:first] = result[first:last]
    elif way == 4:
        result[first:first] = rng.choice(TEXTS)
    else:
        result[first:last] = rng.choice(TEXTS)
    return bytes(result)


def mutate_json(rng: random.Random, tree: Any) -> bytes:
    """The text of a JSON tree, wrong in its meaning, its form or both."""
    way = rng.randrange(3)
    if way:
        tree = mutate_tree(rng, tree)
    raw = json.dumps(tree).encode()
    return raw if way == 1 else mutate_bytes(rng, raw)
