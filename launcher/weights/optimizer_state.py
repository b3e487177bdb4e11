"""Names of optimizer state in files: a prefix and the name of the parameter, whose shape it has."""

from __future__ import annotations

STATE_PREFIXES = ("adam_m.", "adam_v.", "muon_m.", "moments.")
"""Of all optimizers; which of them a parameter has is up to the optimizer that trains it."""


def is_optimizer_state(name: str) -> bool:
    """Whether a tensor of a file is optimizer state, by its name."""
    return name.startswith(STATE_PREFIXES)


def parameter_of(name: str) -> str:
    """The parameter that optimizer state `name` belongs to; a parameter is its own."""
    return name.partition(".")[2] if is_optimizer_state(name) else name
