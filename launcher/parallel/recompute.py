"""Activation checkpointing: modules keep only their inputs and are recomputed in the backward.

Owns the selection of these modules. Invariants: gradients are bitwise the same, as everything a
layer computes is a function of its inputs (dropout included) and is recomputed by the same kernels;
communication inside a module is repeated, on all ranks alike; parameter names do not change.

    recompute                   full layers
    select_recompute            the named modules of the other layers
    select_recompute_exclude    never recomputed: a selected module that contains one of them is
                                replaced by the largest modules in it that do not
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
from launcher.parallel.layer_modules import (
    Function,
    Selection,
    check_patterns,
    is_inside,
    layer_modules,
    layers_selected,
    matching,
    outermost,
    selected,
    selection,
)
from launcher.parallel.remembered import remembering
from models.stage import StageSplit

CHEAP = (r"(.*\.)?\w*norm", r".*\.activation")
"""`select_recompute: True`: the norms and the activations of MLP and experts. They hold a third of
a layer's saved activations, and are cheap to recompute: no matrix product is repeated."""


@dataclass(frozen=True)
class Recompute:
    """What is recomputed in the backward pass."""

    layers: frozenset[int]
    """Numbers of the layers that are recomputed in full."""
    selected: Selection
    excluded: Selection

    def of_layer(self, layer: int, names: Collection[str]) -> list[str]:
        """Which of `names`, the modules of a layer, are recomputed: none of them inside another."""
        if layer in self.layers:
            found = {""}
        else:
            found = selected(self.selected, layer, names)
        return _without(outermost(found), selected(self.excluded, layer, names), names)


def recompute_plan(section: RecomputeSection, split: StageSplit) -> Recompute:
    """The plan of a configuration; `split` covers all layers of the model."""
    return Recompute(
        layers_selected(section.recompute, split),
        selection(section.select_recompute, split, CHEAP),
        selection(section.select_recompute_exclude, split, ()),
    )


def check_recompute(
    section: RecomputeSection,
    split: StageSplit,
    names: Collection[str],
    where: Callable[[str], str],
) -> str:
    """The configured patterns that have no effect on a model with these modules, as text; empty if
    there are none. `where`: from a key to file and line.

    Raises UserError for a pattern that matches no module.
    """
    plan = recompute_plan(section, split)
    written = {"select_recompute": plan.selected, "select_recompute_exclude": plan.excluded}
    idle: list[str] = []
    for key, patterns_of in written.items():
        patterns = [pattern for pattern in patterns_of if pattern not in CHEAP]
        idle += check_patterns(f"recompute_config.{key}", patterns, names, where)
    return ", ".join(idle)


def recomputed_modules(layers: Mapping[int, nn.Module], plan: Recompute) -> dict[int, list[str]]:
    """The names of the recomputed modules of each layer, by layer number."""
    return {number: plan.of_layer(number, layer_modules(layer)) for number, layer in layers.items()}


def apply_recompute(
    layers: Mapping[int, nn.Module], names: Mapping[int, Collection[str]], *, uses_rng: bool = False
) -> None:
    """Recompute the named modules of `layers` in the backward pass.

    `uses_rng`: the layers use torch's global generator, whose state is restored for recomputation.
    """
    for number, layer in layers.items():
        found = layer_modules(layer)
        for name in names[number]:
            found[name].wrap(partial(_recomputed, uses_rng=uses_rng))


def is_cheap(name: str) -> bool:
    """Whether a module is cheap to recompute."""
    return any(matching(pattern, (name,)) for pattern in CHEAP)


def _recomputed(function: Function, uses_rng: bool) -> Function:
    @wraps(function)
    def recomputed(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*arguments, **keywords)
        return checkpoint(
            # In a graph, where a host read cannot be, memory would break it.
            function if torch.compiler.is_compiling() else remembering(function),
            *arguments,
            use_reentrant=False,
            preserve_rng_state=uses_rng,
            **keywords,
        )

    return recomputed


def _without(found: list[str], excluded: set[str], names: Collection[str]) -> list[str]:
    """The largest modules in those `found` that neither are, nor are in, nor contain an `excluded`
    one."""
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
