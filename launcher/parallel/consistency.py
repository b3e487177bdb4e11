"""Consistency: values that must be equal on all ranks, although each machine reads its own files.

A rank with another configuration, other weights or other prompts would hang in a different
collective than its peers, or compute something else silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.errors import Problem, UserError
from launcher.parallel.world import World

_CHARACTERS = 60
_SHOWN = 5


def check_same(world: World, values: Mapping[str, Any], *, rule: str, advice: str) -> None:
    """Check that `values`, by name, are equal on all ranks. Called by all ranks together.

    Raises `UserError` on every rank, with one problem for each of the first facts that differ.
    """
    reported = world.gather(dict(values))
    names = dict.fromkeys(name for given in reported for name in given)
    problems = []
    for name in names:
        found = [given.get(name) for given in reported]
        other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            problems.append(
                Problem(
                    what=f"{name}: {_short(found[other])} on rank {other}, {_short(found[0])} "
                    "on rank 0",
                    rule=rule,
                    advice=advice,
                )
            )
    if problems:
        raise UserError(problems[:_SHOWN])


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, Unquoted) else repr(value)
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..."


class Unquoted(str):
    """A description of a value, shown without quotes."""
