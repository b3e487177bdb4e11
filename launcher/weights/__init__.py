"""Weights: what is on disk becomes what each rank needs, and back, box by box.

The Python calls of the original are here under its names; each is imported when it is asked for, so
that one that reads files does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

CALLS = {"merge_pipeline_strategys": "launcher.weights.strategies"}
"""Call to the module it lives in."""


def __getattr__(name: str) -> Any:
    if name in CALLS:
        return getattr(import_module(CALLS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
