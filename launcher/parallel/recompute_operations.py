"""Activation checkpointing by operation: a layer keeps the results of some operations and computes
the others again in the backward pass.

Owns the choice. A layer is measured on its first call, which all ranks make together, by an extra
run whose activations are freed: what each operation costs and what its result takes, and how much
the layer saves without recomputation. Then either

    products       keeps the results of matrix products and attention, whatever they take
    memory budget  keeps, of all operations, those that are dearest for their bytes, as far as the
                   budget goes: 0 is a full recomputation, 1 what the layer saves without one

The cost of an operation is the larger of its FLOPs and its traffic, at the ratio of an H100, so
that the choice is a function of shapes: the same in every run, on any device.

Invariants: gradients are bitwise those without recomputation, as kept and recomputed results are.
Communication is never kept, so that all ranks repeat it, whatever each of them keeps; nor is a
result that something writes into later. Operations are identified by their number in the layer, so
that FSDP's hooks on modules of it, which gather and cast weights in one run and find them in the
next, are not counted.

The mechanism is `launcher.parallel.kept_results`. Under torch.compile the compiler partitions each
graph by the same budget (`set_compiled_budget`), and recomputes what is cheap and keeps products by
itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from launcher.parallel.kept_results import Key, Numbering, keeping, unselected
from launcher.parallel.layer_modules import Function, layer_modules
from launcher.parallel.local import local
from launcher.parallel.remembered import remembering
from models.decoder import DecoderLayer

FLOPS_PER_BYTE = 295
"""989 TFLOP/s in bfloat16 over 3.35 TB/s: an H100 SXM (NVIDIA's data sheet)."""
_COMMUNICATION = ("c10d", "_c10d_functional", "_dtensor")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm",
             "linear", "_linear_pointwise")  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One call of an operation in a layer."""

    key: Key
    nbytes: int
    """Of its results."""
    flops: int
    traffic: int
    """Bytes read and written."""
    is_product: bool
    """A matrix product or attention."""

    @property
    def cost(self) -> float:
        """Time, in bytes of traffic."""
        return _cost(self.flops, self.traffic)


def _cost(flops: int, traffic: int) -> float:
    return max(flops / FLOPS_PER_BYTE, traffic)


@dataclass(frozen=True)
class Measured:
    """What a layer does for rows of one shape."""

    operations: tuple[Operation, ...]
    """Those whose results can be kept, in order."""
    total_cost: float
    """Of all operations."""
    saved_bytes: int
    """What the layer saves for its backward pass without recomputation, besides its inputs."""


@dataclass(frozen=True)
class Choice:
    """What a layer keeps."""

    kept: frozenset[Key]
    text: str
    """For the log."""


def choose(measured: Measured, budget: float | None) -> Choice:
    """The operations to keep: products for None, else those that are worth it within the budget, in
    [0, 1].

    Greedy by cost per byte, earlier ones first among equals. It is at most one operation from the
    optimum of this knapsack, whose items are many and small.
    """
    if budget is None:
        chosen = [operation for operation in measured.operations if operation.is_product]
    else:
        left = budget * measured.saved_bytes
        chosen = []
        for operation in sorted(measured.operations, key=lambda o: -o.cost / o.nbytes):
            if operation.nbytes <= left:
                left -= operation.nbytes
                chosen.append(operation)
    names = Counter(o.key[0]._opname.strip("_") for o in chosen if o.is_product)
    names["smaller ones"] = len(chosen) - names.total()
    again = measured.total_cost - sum(operation.cost for operation in chosen)
    text = (
        f"a layer keeps {_megabytes(sum(o.nbytes for o in chosen))} of "
        f"{_megabytes(measured.saved_bytes)} MB and repeats "
        f"{again / max(measured.total_cost, 1):.0%} of its forward pass; kept: "
        + (", ".join(f"{count} {name}" for name, count in names.items() if count) or "nothing")
    )
    return Choice(frozenset(operation.key for operation in chosen), text)


def apply_recompute_operations(
    layers: Mapping[int, nn.Module],
    budget: float | None,
    *,
    uses_rng: bool = False,
    log: Callable[[str], None],
) -> None:
    """Recompute the operations of `layers` that are not worth keeping, within `budget`; None: keep
    products and attention. Called after compilation of parts, before offload.

    `uses_rng`: the layers use torch's global generator, whose state is restored for recomputation.
    Each choice that differs from those before is logged once.
    """
    logged: set[str] = set()

    def report(choice: Choice) -> None:
        if choice.text not in logged:
            logged.add(choice.text)
            log(f"recompute by operation: {choice.text}")

    for layer in layers.values():
        wrap = partial(_selective, layer=layer, budget=budget, uses_rng=uses_rng, report=report)
        layer_modules(layer)[""].wrap(wrap)


def set_compiled_budget(budget: float) -> None:
    """Have torch.compile keep, of what a graph saves for its backward pass, at most this share
    more than a full recomputation of the graph would: the same scale as that of `choose`."""
    import torch._functorch.config as config

    config.activation_memory_budget = budget


def _selective(
    function: Function, *, layer: nn.Module, budget: float | None, uses_rng: bool,
    report: Callable[[Choice], None],
) -> Function:  # fmt: skip
    choice: Choice | None = None

    @wraps(function)
    def recomputed(*arguments: Any, **keywords: Any) -> Any:
        nonlocal choice
        if not torch.is_grad_enabled():
            return function(*arguments, **keywords)
        if isinstance(layer, DecoderLayer):
            # Caches that the first layer fills must be there for the first run too, or its
            # operations would not be those of the second.
            layer.self_attn.prepare(arguments[1])
        if choice is None:
            _hide_hooks(layer)
            with torch.random.fork_rng(_current_gpu(), enabled=uses_rng):
                measured = measure(layer, lambda: function(*arguments, **keywords), arguments)
            choice = choose(measured, budget)
            report(choice)
        return checkpoint(
            remembering(function), *arguments, use_reentrant=False, preserve_rng_state=uses_rng,
            context_fn=partial(keeping, choice.kept), **keywords,
        )  # fmt: skip

    return recomputed


def _current_gpu() -> list[int]:
    """The GPU of this process, whose generator counts: by default torch forks those of all."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def _hide_hooks(layer: nn.Module) -> None:
    """Let operations of FSDP's hooks on modules inside of `layer` not be seen here."""
    for module in layer.modules():
        if module is not layer and isinstance(module, FSDPModule):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                hooks.update({key: _not_seen(hook) for key, hook in hooks.items()})


def _not_seen(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def run(*arguments: Any, **keywords: Any) -> Any:
        with unselected():
            return hook(*arguments, **keywords)

    return run


def measure(layer: nn.Module, run: Callable[[], Any], inputs: Sequence[Any] = ()) -> Measured:
    """What `run`, a call of `layer` with these `inputs`, does; its results are freed."""
    outside = {_storage(local(p)) for p in layer.parameters()}
    outside |= {_storage(t) for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    saved: dict[int, int] = {}
    holds: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        held = local(tensor)
        if held.numel() and _storage(held) not in outside and _storage(held) not in saved:
            saved[_storage(held)] = held.untyped_storage().nbytes()
            holds.append(held)
        return tensor

    recorder = _Recorder()
    with saved_tensors_hooks(pack, lambda tensor: tensor), recorder:
        run()
    return Measured(tuple(recorder.keepable()), recorder.total_cost, sum(saved.values()))


class _Recorder(TorchDispatchMode):
    """Records every operation, and which results are written into afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.total_cost = 0.0
        self._numbering = Numbering()
        self._found: list[tuple[Operation, tuple[int, ...]]] = []
        self._written: set[int] = set()
        self._holds: list[Tensor] = []

    def keepable(self) -> Iterator[Operation]:
        """The operations whose results can be kept."""
        for operation, storages in self._found:
            if self._written.isdisjoint(storages):
                yield operation

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        key = self._numbering.next(operator)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if operator.namespace in _COMMUNICATION or operator._schema.is_mutable:
            self._written.update(_storage(t) for t in (*read, *made))
            self._holds += made
            return result
        inputs = {_storage(t) for t in read}
        new = [t for t in made if _storage(t) not in inputs]
        if not new:  # a view
            return result
        flops = _flops(operator, args, kwargs, result)
        nbytes, traffic = sum(t.nbytes for t in new), sum(t.nbytes for t in (*read, *new))
        self.total_cost += _cost(flops, traffic)
        # Indices and masks may be cached for other layers: they are not kept for this one.
        floating = all(t.is_floating_point() for t in read) or flops > 0
        if key is not None and nbytes and read and floating and new[0].is_floating_point():
            operation = Operation(key, nbytes, flops, traffic, is_product=flops > 0)
            self._found.append((operation, tuple(_storage(t) for t in new)))
        self._holds += new
        return result


def _flops(operator: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of a product or of attention; 0 of other operations."""
    packet = operator._overloadpacket
    name = operator._opname
    if name in ("_grouped_mm", "_scaled_grouped_mm"):  # [n, k] times one of [groups, k, m] a row
        return 2 * args[0].numel() * result.shape[-1]
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if "attn" in name or "attention" in name:
        query, key = args[0], args[1]
        # [rows, heads, length, size], or all rows in one: [length, heads, size]
        length = key.shape[-2] if key.dim() == 4 else key.shape[0]
        return 4 * query.numel() * length
    if name in _PRODUCTS:
        return 2 * args[0].numel() * result.shape[-1]
    return 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"
