"""Where each value of a configuration came from.

Owns the map from dotted key to the place that set it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.errors import Problem

DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class KeyProblem(Problem):
    """A problem that is about one key; `also` names further keys it follows from."""

    key: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Dotted key to `x.yaml:14` or `command line: --epochs`; a key not in it is a default."""

    places: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key to value of the keys that are set and have no field in the configuration."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Dotted key to the key of another program that it was written as."""

    def where(self, key: str) -> str:
        """The place that set `key`, else `default`."""
        return self.places.get(key, DEFAULT)

    def is_written(self, key: str) -> bool:
        """Whether the user wrote this key."""
        return key in self.places

    def nearest(self, key: str) -> str:
        """The place of `key` or of the section around it; empty when nothing of it is written."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return ""

    def as_written(self, problem: Problem) -> Problem:
        """The problem under the key that the user wrote."""
        key = getattr(problem, "key", "")
        rest = problem.what.removeprefix(key)
        renamed = key  # the key, or a section around it
        while renamed and renamed not in self.names:
            renamed = renamed.rpartition(".")[0]
        is_about_it = renamed and rest != problem.what and rest[:1] in ("", " ", ":")
        name = self.names.get(renamed, "") + key.removeprefix(renamed)
        return replace(problem, what=name + rest) if is_about_it else problem
