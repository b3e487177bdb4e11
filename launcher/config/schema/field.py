"""Metadata of a field of the schema: what this version does with a key.

Owns the metadata of a field: its status (effective, accepted without effect, not built yet), its
bounds and its choices. The checks, the messages and docs/configuration.md all read it from here,
so that a key is classified in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["effective", "no effect", "not built yet"]
_KEY = "slipway"


@dataclass(frozen=True, kw_only=True)
class FieldInfo:
    """What the schema knows about one key beside its type and default."""

    status: Status = "effective"
    why: str = ""
    """`no effect`: why the key means nothing here. `not built yet`: how to go on without it."""
    harmless: tuple[Any, ...] = ()
    """Values of a key not built yet that change nothing; the default is one of them."""
    choices: tuple[Any, ...] = ()
    """The values allowed; empty: any value of the type."""
    planned: tuple[str, ...] = ()
    """Values that MindFormers has and this version does not: refused as not built yet."""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    open_keys: bool = False
    """The field collects the keys of an open section that have no field of their own."""
    none_means_absent: bool = False
    """An empty section in YAML means that the section is absent."""


def _with(default: Any, info: FieldInfo) -> Any:
    metadata = {_KEY: info}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def effective(
    default: Any,
    *,
    choices: Sequence[Any] = (),
    planned: Sequence[str] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A key that acts, with bounds or choices (a plain default means no bounds)."""
    return _with(
        default,
        FieldInfo(
            choices=tuple(choices),
            planned=tuple(planned),
            minimum=minimum,
            above=above,
            maximum=maximum,
        ),
    )


def no_effect(default: Any, why: str = "", *, choices: Sequence[Any] = ()) -> Any:
    """A key that is accepted, has no effect, and is reported once."""
    return _with(default, FieldInfo(status="no effect", why=why, choices=tuple(choices)))


def not_built(
    default: Any,
    advice: str = "",
    *,
    harmless: Sequence[Any] = (),
    choices: Sequence[Any] = (),
    minimum: float | None = None,
) -> Any:
    """A key that is refused as not built yet, unless its value is a harmless one."""
    info = FieldInfo(
        status="not built yet",
        why=advice,
        harmless=(default, *harmless),
        choices=tuple(choices),
        minimum=minimum,
    )
    return _with(default, info)


def section(kind: type) -> Any:
    """A section that is always there: what the user writes is merged over its defaults."""
    return field(default_factory=kind, metadata={_KEY: FieldInfo()})


def optional_section() -> Any:
    """A section that is absent (None) unless the user writes it."""
    return field(default=None, metadata={_KEY: FieldInfo(none_means_absent=True)})


def open_keys(why: str = "", *, status: Status = "effective") -> Any:
    """Collects the keys of an open section that the schema does not name."""
    info = FieldInfo(status=status, why=why, open_keys=True)
    return field(default_factory=dict, metadata={_KEY: info})


def info_of(key: dataclasses.Field[Any]) -> FieldInfo:
    """The classification of one dataclass field; a plain field is effective."""
    info = key.metadata.get(_KEY)
    return info if isinstance(info, FieldInfo) else FieldInfo()
