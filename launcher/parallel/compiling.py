"""Layers compiled by torch.compile.

Owns what is compiled together. A layer is one graph, inside of its hooks: those of FSDP stay
outside, those of tensor parallelism on the regions belong to it. Out of the graph are

    experts                 how many tokens each gets is data, which no graph can depend on
    pieces that run again   compiled by themselves, and what is put round them left as it is; cheap
    or move what they keep  ones (norms, activations) stay in the graph of the layer

Shapes are fixed: rows of another number or length are compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from launcher.parallel.pieces import Function, pieces
from models.moe import Experts

USUAL = "inductor"
Names = Mapping[int, Collection[str]]
"""Number of a layer -> names of pieces of it."""


def compile_layers(layers: Mapping[int, nn.Module], backend: str, apart: Names) -> None:
    """Compile the forward pass of each layer, and its backward pass, when it first runs; the pieces
    `apart` by themselves. Before anything else is put round layers and pieces."""
    # Layers share their code, and torch gives up on code that it has compiled this often: for each
    # layer there may be training, evaluation, and rows of another shape.
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(getattr(config, limit), 8 * len(layers)))
    compiled = partial(torch.compile, backend=backend, dynamic=False)
    for number, layer in layers.items():
        for name in ("", *apart[number]):
            pieces(layer)[name].wrap(compiled)


def leave_out(layers: Mapping[int, nn.Module], apart: Names) -> None:
    """Let what was put round the pieces `apart`, and experts, run as they are; once it is there."""
    for number, layer in layers.items():
        for name in apart[number]:
            pieces(layer)[name].wrap(_as_it_is)
        for module in layer.modules():
            if isinstance(module, Experts):
                module.forward = _as_it_is(module.forward)  # type: ignore[method-assign]


def _as_it_is(function: Function) -> Function:
    run: Callable[..., Any] = torch.compiler.disable(lambda *arguments: function(*arguments))
    return run
