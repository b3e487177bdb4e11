"""Recomputation: pieces of a layer keep their inputs alone, and run again in the backward pass.

Owns which pieces those are. Invariants: gradients are the same to the bit, as everything a layer
computes is a function of its inputs (dropout included) and runs again with the same kernels;
communication inside a piece happens again, on all ranks alike; names of parameters do not change.

    recompute                   the layer keeps the states it was given
    select_recompute            the named pieces of the other layers keep what they were given
    select_recompute_exclude    these are never run again: around them, the largest pieces
                                that hold none of them
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.config.schema.parallel import RecomputeSection
from launcher.parallel.pieces import (
    Function,
    Selection,
    check_patterns,
    is_inside,
    layers_chosen,
    matching,
    outermost,
    pieces,
    selected,
    selection,
)
from models.stage import StageSplit

CHEAP = (r"(.*\.)?\w*norm", r".*\.activation")
"""`select_recompute: True`: the norms and the activations of MLP and experts. They keep a third of
what a layer keeps, and cost next to nothing: no matrix product runs again."""


@dataclass(frozen=True)
class Recompute:
    """What runs again in the backward pass."""

    whole: frozenset[int]
    """Layers, by number."""
    chosen: Selection
    excluded: Selection

    def of_layer(self, layer: int, names: Collection[str]) -> list[str]:
        """Which of `names`, the pieces of a layer, run again: none of them inside of another."""
        if layer in self.whole:
            found = {""}
        else:
            found = selected(self.chosen, layer, names)
        return _without(outermost(found), selected(self.excluded, layer, names), names)


def recompute_plan(section: RecomputeSection, split: StageSplit) -> Recompute:
    """The plan of a configuration; `split` has all layers of the model."""
    return Recompute(
        layers_chosen(section.recompute, split),
        selection(section.select_recompute, split, CHEAP),
        selection(section.select_recompute_exclude, split, ()),
    )


def check_recompute(
    section: RecomputeSection,
    split: StageSplit,
    names: Collection[str],
    where: Callable[[str], str],
) -> str:
    """What of the configuration has no effect on a model with these pieces, empty for nothing.
    `where`: from a key to file and line.

    Raises UserError for a pattern that names no piece.
    """
    plan = recompute_plan(section, split)
    written = {"select_recompute": plan.chosen, "select_recompute_exclude": plan.excluded}
    idle: list[str] = []
    for key, choice in written.items():
        patterns = [pattern for pattern in choice if pattern not in CHEAP]
        idle += check_patterns(f"recompute_config.{key}", patterns, names, where)
    return ", ".join(idle)


def recomputed_pieces(layers: Mapping[int, nn.Module], plan: Recompute) -> dict[int, list[str]]:
    """The names of the pieces of each layer, by number, that run again."""
    return {number: plan.of_layer(number, pieces(layer)) for number, layer in layers.items()}


def apply_recompute(
    layers: Mapping[int, nn.Module], names: Mapping[int, Collection[str]], *, draws: bool = False
) -> None:
    """Let the named pieces of `layers` run again in the backward pass.

    `draws`: the layers draw from torch's generator, which is then put back for the second run.
    """
    for number, layer in layers.items():
        found = pieces(layer)
        for name in names[number]:
            found[name].wrap(partial(_twice, draws=draws))


def is_cheap(name: str) -> bool:
    """Whether a piece is one of those that cost next to nothing."""
    return any(matching(pattern, (name,)) for pattern in CHEAP)


def _twice(function: Function, draws: bool) -> Function:
    @wraps(function)
    def recomputed(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*arguments, **keywords)
        return checkpoint(
            function, *arguments, use_reentrant=False, preserve_rng_state=draws, **keywords
        )

    return recomputed


def _without(found: list[str], excluded: set[str], names: Collection[str]) -> list[str]:
    """The largest pieces of those `found` that neither are, nor are in, nor hold one `excluded`."""
    kept: list[str] = []
    for name in found:
        if name in excluded or any(is_inside(name, other) for other in excluded):
            continue
        if not any(is_inside(other, name) for other in excluded):
            kept.append(name)
            continue
        within = [other for other in names if is_inside(other, name)]
        kept += _without(outermost(within), excluded, names)
    return kept
