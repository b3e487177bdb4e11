"""Layers compiled by torch.compile.

Owns what is compiled together. A layer is one graph: FSDP's hooks on the layer stay outside,
tensor parallelism's hooks on its regions are part of it. Not in this graph are

    experts                  their token counts depend on data
    modules with recompute   compiled separately, and their wrappers not at all; cheap ones (norms,
    or offload               activations) stay in the graph of the layer

Shapes are static: another number or length of rows recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from launcher.parallel.layer_modules import Function, layer_modules
from models.moe import Experts

DEFAULT_BACKEND = "inductor"
Names = Mapping[int, Collection[str]]
"""Layer number -> names of modules in it."""


def backend_of(written: bool | str) -> str | None:
    """The backend of a value of `compile`; None: nothing is compiled."""
    if isinstance(written, str):
        return written
    return DEFAULT_BACKEND if written else None


def compile_layers(layers: Mapping[int, nn.Module], backend: str, separate: Names) -> None:
    """Compile the forward and backward pass of each layer on its first run; the modules `separate`
    on their own. Must be called before layers and modules are wrapped by anything else."""
    # Layers share their code, and torch falls back to eager beyond this many compilations of the
    # same code: a layer may need one for training, evaluation, and each shape of rows.
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(getattr(config, limit), 8 * len(layers)))
    compiled = partial(torch.compile, backend=backend, dynamic=False)
    for number, layer in layers.items():
        for name in ("", *separate[number]):
            layer_modules(layer)[name].wrap(compiled)


def exclude_from_compile(layers: Mapping[int, nn.Module], separate: Names) -> None:
    """Exclude experts, and the wrappers of the modules `separate`, from compilation. Must be called
    after they are wrapped."""
    for number, layer in layers.items():
        for name in separate[number]:
            layer_modules(layer)[name].wrap(_disabled)
        for module in layer.modules():
            if isinstance(module, Experts):
                module.forward = _disabled(module.forward)  # type: ignore[method-assign]


def _disabled(function: Function) -> Function:
    run: Callable[..., Any] = torch.compiler.disable(lambda *arguments: function(*arguments))
    return run
