"""Where functions that read weights report what is not an error: a callable that takes one line."""

from __future__ import annotations

from collections.abc import Callable

Log = Callable[[str], None]


def no_log(text: str) -> None:
    """Drops the line."""
