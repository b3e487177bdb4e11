"""Layers compiled by torch.compile.

Owns what is compiled together, that equal layers share one graph, and what happens where the
compiler fails. A layer is one graph: FSDP's hooks on the layer stay outside, tensor parallelism's
hooks on its regions are part of it. Not in this graph are

    experts                  a graph of their own, for any number of tokens, where one kernel takes
                             all of them (bfloat16); else not compiled: the host needs token counts
    modules with recompute   compiled separately, and their wrappers not at all; cheap ones (norms,
    or offload               activations) stay in the graph of the layer

Invariants: layers of the same structure compile once for training and once for evaluation, however
many there are (torch guards on numbers that a graph reads, so the layer's number in the seeds of
dropout is a tensor, and masks that all layers share are built before the first of them runs).
Shapes are static: another number or length of rows recompiles. A function that failed to compile
stays eager for the rest of the run: a layer is recomputed in the backward pass by what ran in the
forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.parallel.layer_modules import Function, layer_modules
from models.attention import BaseAttention, StepContext
from models.decoder import DecoderLayer
from models.grouped import Groups, has_kernel
from models.lora import adapters_of
from models.moe import Experts

DEFAULT_BACKEND = "inductor"
Names = Mapping[int, Collection[str]]
"""Layer number -> names of modules in it."""


@dataclass
class Compiler:
    """A backend of torch.compile, and what to do where it fails."""

    backend: str | Callable[..., Any]
    falls_back: bool = False
    """Run what fails to compile eagerly, with one line in the log; False: raise UserError."""
    where: str = ""
    """File and line of the configured key, for the error."""
    log: Callable[[str], None] = logging.getLogger(__name__).warning
    failures: list[str] = field(default_factory=list)
    """The first line of every failure so far."""

    def compiled(self, function: Function, *, dynamic: bool | None = False) -> Function:
        """`function`, compiled on its first call. `dynamic`: as in `torch.compile`; None: sizes
        that were seen to change become variables."""
        compiled = torch.compile(function, backend=self.backend, dynamic=dynamic)
        failed = False

        @wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            nonlocal failed
            if failed:
                return function(*arguments, **keywords)
            try:
                return compiled(*arguments, **keywords)
            except _compiler_errors() as error:
                self._report(error)
                failed = True
            return function(*arguments, **keywords)

        return run

    def _report(self, error: Exception) -> None:
        """Log the first failure; raises UserError where there is no way back."""
        reason = first_line(error)
        if not self.falls_back:
            raise UserError(
                f"compile: {self.backend!r} failed: {reason}",
                where=self.where,
                rule="every layer is compiled with the backend that is configured",
                nearest="Nearest: False",
                advice="`auto` runs layers eagerly where they do not compile",
            ) from error
        if not self.failures:
            self.log(f"warning: compile: a layer runs eagerly, the compiler failed: {reason}")
        self.failures.append(reason)


def _compiler_errors() -> tuple[type[Exception], ...]:
    """Failures of the compiler and its backends. Errors of the computation itself, out-of-memory
    among them, have other types."""
    from torch._dynamo.exc import TorchDynamoException  # here: it takes a second to import

    return (TorchDynamoException,)


def first_line(error: BaseException) -> str:
    """The first line of the error that the compiler met: where several are chained, the last."""
    inner = getattr(error, "inner_exception", None) or error
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__


@cache
def why_unusable(backend: str, device: torch.device) -> str:
    """Why this process cannot compile for `device`, as for inductor without a C compiler or triton;
    empty where it can. A small function is compiled to find out."""
    try:
        compiled = torch.compile(lambda x: (x + 1).sin().sum(), backend=backend, dynamic=False)
        compiled(torch.ones(64, device=device, requires_grad=True)).backward()
    except Exception as error:
        return first_line(error)
    return ""


def make_repeatable() -> None:
    """Have inductor choose kernels that do not depend on benchmarks of the moment, where torch is
    set to deterministic algorithms: benchmarks choose other reductions in another process, and
    their sums have other roundings."""
    from torch._inductor import config

    if torch.are_deterministic_algorithms_enabled() and hasattr(config, "deterministic"):
        config.deterministic = True


def compile_layers(
    layers: Mapping[int, nn.Module],
    compiler: Compiler,
    separate: Names,
    device: torch.device | None = None,
) -> None:
    """Compile the forward and backward pass of each layer on its first run; the modules `separate`
    on their own. Must be called before layers and modules are wrapped by anything else.

    `device`: where the layers will run; None is the CPU.
    """
    # Layers share their code, and torch falls back to eager beyond this many compilations of the
    # same code: a layer may need one for training, evaluation, and each shape of rows.
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(getattr(config, limit), 8 * len(layers)))
    for number, layer in layers.items():
        _share_seeds(layer, device or torch.device("cpu"))
        for name in ("", *separate[number]):
            module = layer_modules(layer)[name]
            if not (isinstance(module.owner, Experts) and module.attribute == "forward"):
                module.wrap(compiler.compiled)
        for experts in layer.modules():
            if isinstance(experts, Experts):
                experts.forward = _compiled(experts, compiler)  # type: ignore[method-assign]
        if isinstance(layer, DecoderLayer):
            layer_modules(layer)[""].wrap(partial(_prepared, attention=layer.self_attn))


def _compiled(experts: Experts, compiler: Compiler) -> Function:
    """`experts.forward`, compiled for the dtypes whose products one kernel computes."""
    plain = experts.forward
    compiled = compiler.compiled(plain, dynamic=None)

    @wraps(plain)
    def run(tokens: Tensor, groups: Groups) -> Tensor:
        stacks = [weight for weight in experts.parameters(recurse=False) if weight.dim() == 3]
        has_kernels = tokens.dtype == torch.bfloat16 and all(map(has_kernel, stacks))
        result: Tensor = (compiled if has_kernels else plain)(tokens, groups)
        return result

    return run


def exclude_from_compile(layers: Mapping[int, nn.Module], separate: Names) -> None:
    """Exclude experts, which are compiled on their own, and the wrappers of the modules `separate`
    from the graphs of layers. Must be called after they are wrapped."""
    for number, layer in layers.items():
        for name in separate[number]:
            layer_modules(layer)[name].wrap(_disabled)
        for module in layer.modules():
            if isinstance(module, Experts):
                module.forward = _disabled(module.forward)  # type: ignore[method-assign]


def _share_seeds(layer: nn.Module, device: torch.device) -> None:
    """Make the number of a layer, from which seeds of dropout are computed, an input of its graph.
    As a Python integer it would be a constant, and each layer a graph of its own."""
    seeded: list[Any] = [m for m in layer.modules() if isinstance(m, DecoderLayer | BaseAttention)]
    seeded += [adapter for module in layer.modules() for adapter in adapters_of(module)]
    for owner in seeded:
        if owner.dropout:
            owner.seed_layer = torch.tensor(owner.seed_layer, dtype=torch.int64, device=device)


def _prepared(function: Function, attention: BaseAttention) -> Function:
    """`function` of a layer, which finds the masks of its attention built."""

    @wraps(function)
    def prepared(states: Any, context: StepContext) -> Any:
        attention.prepare(context)
        return function(states, context)

    return prepared


def _disabled(function: Function) -> Function:
    run: Callable[..., Any] = torch.compiler.disable(lambda *arguments: function(*arguments))
    return run
