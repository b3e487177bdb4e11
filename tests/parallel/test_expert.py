"""Expert parallelism: tokens are dispatched to experts on other ranks, with the same results.

Every comparison is max|difference| / max|reference| in float32 against the same module in one
process.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launcher.parallel import world
from launcher.parallel.collectives import RowsUnderWay
from launcher.parallel.context import ContextParallel, apply_context_parallel
from launcher.parallel.expert import ExpertExchange, apply_expert_parallel, by_expert
from launcher.parallel.host_copy import HostCopy
from launcher.parallel.kept_results import keeping
from launcher.parallel.remembered import remembering
from models.decoder import Decoder
from models.grouped import Groups
from models.moe import Experts, MoE
from tests.models.tiny import EXPERTS, experts_spec, tokens
from tests.ranks import run_ranks

CLOSE = 1e-5
HIDDEN, INNER = 16, 24
FAMILIES = tuple(EXPERTS)


@pytest.mark.parametrize(
    "counts",
    [[[2, 0, 1], [1, 3, 0]], [[0, 0], [0, 0], [0, 0]], [[0, 4], [0, 0]], [[1], [0], [2], [5]]],
)
def test_received_tokens_are_sorted_by_expert_and_then_by_rank(counts: list[list[int]]) -> None:
    came = [
        (expert, rank, n)
        for rank, line in enumerate(counts)
        for expert, count in enumerate(line)
        for n in range(count)
    ]
    order, back = by_expert(torch.tensor(counts), len(came))
    assert [came[place] for place in order.tolist()] == sorted(came)
    assert [sorted(came)[place] for place in back.tolist()] == came


# Full decoders on data-parallel ranks, each with its own tokens.


@pytest.mark.parametrize(("ranks", "together"), [(2, 2), (4, 4), (4, 2)])
def test_logits_and_gradients_are_those_of_one_process(ranks: int, together: int) -> None:
    for errors in run_ranks(ranks, _compare_decoders, together):
        assert set(errors) == set(FAMILIES)
        assert all(max(error) <= CLOSE for error in errors.values()), errors


def _compare_decoders(together: int) -> dict[str, tuple[float, float]]:
    """(worst error of the logits, of the gradients) for every family."""
    group = _start(together)
    try:
        return {family: _compare(family, group) for family in FAMILIES}
    finally:
        world.stop()


def _start(together: int | None = None) -> dist.ProcessGroup:
    """Join the job; returns the `ep` group of this rank: `together` neighbours, or all ranks."""
    here = world.start(force_cpu=True)
    lines = torch.arange(here.size).view(-1, together or here.size).tolist()
    group, _ = dist.new_subgroups_by_enumeration(lines)
    return group


def _compare(family: str, group: dist.ProcessGroup) -> tuple[float, float]:
    alone, shared = _decoder(family), _decoder(family)
    _keep_own_experts(shared, group)
    apply_expert_parallel(shared, group)
    expected = [alone(_ids(rank)) for rank in range(dist.get_world_size())]
    sum(_loss(logits) for logits in expected).backward()
    found = shared(_ids(dist.get_rank()))
    _loss(found).backward()
    for parameter in shared.parameters():
        dist.all_reduce(parameter.grad)
    return error(expected[dist.get_rank()], found), _worst(alone, shared)


def _decoder(family: str) -> Decoder:
    spec = experts_spec(family)
    assert spec.decoder is not None
    decoder = Decoder(spec.decoder, spec.precision)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.1 * noise)
    return decoder.train()


def _keep_own_experts(model: Decoder, group: dist.ProcessGroup) -> None:
    """Views that select this rank's experts; gradients of the others stay zero."""
    for module in model.modules():
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters():
                count = len(parameter) // dist.get_world_size(group)
                first = dist.get_rank(group) * count
                module.views[name] = lambda p, own=slice(first, first + count): p[own]


def _ids(rank: int) -> Tensor:
    """Another number of tokens on each rank."""
    return tokens(1 + rank % 2, 5 + 3 * rank, seed=rank)


def _loss(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 2, logits.numel()).view(logits.shape).cos()).sum()


def _worst(alone: Decoder, shared: Decoder) -> float:
    pairs = zip(alone.parameters(), shared.parameters(), strict=True)
    return max(error(theirs.grad, ours.grad) for theirs, ours in pairs)


def error(expected: Tensor, found: Tensor) -> float:
    """max|difference| / max|expected|; without any element there is none."""
    if not expected.numel():
        return 0.0 if expected.shape == found.shape else float("inf")
    largest = expected.abs().max().clamp_min(1e-30)
    return ((expected - found).abs().max() / largest).item()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers_may_be_compiled(backend: str) -> None:
    for errors in run_ranks(2, _compare_compiled, backend):
        assert max(errors) <= CLOSE, errors


def _compare_compiled(backend: str) -> tuple[float, float]:
    group = _start(2)
    try:
        alone, shared = _decoder("mixtral"), _decoder("mixtral")
        _keep_own_experts(shared, group)
        apply_expert_parallel(shared, group)
        for layer in shared.model.layers.values():
            layer.compile(backend=backend)
        ids = tokens(2, 8)
        expected, found = alone(ids), shared(ids)
        _loss(expected).backward()
        _loss(found / 2).backward()
        for parameter in shared.parameters():
            dist.all_reduce(parameter.grad)
        return error(expected, found), _worst(alone, shared)
    finally:
        world.stop()


# Experts by themselves, with the parameters of this rank alone.

COUNTS = {
    "some for each": [[2, 1, 3, 1], [1, 4, 2, 2]],
    "a rank without tokens": [[2, 1, 3, 1], [0, 0, 0, 0]],
    "an expert that no token chose": [[2, 0, 3, 1], [1, 0, 2, 2]],
    "a rank whose experts no token chose": [[0, 0, 3, 1], [0, 0, 2, 2]],
    "a rank with neither": [[0, 0, 3, 1], [0, 0, 0, 0]],
    "all on other ranks": [[0, 0, 3, 1], [4, 1, 0, 0]],
    "no tokens at all": [[0, 0, 0, 0], [0, 0, 0, 0]],
}
"""Tokens of two ranks for four experts."""


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_of_experts_for_any_routing(ranks: int) -> None:
    for errors in run_ranks(ranks, _compare_experts):
        assert set(errors) == set(COUNTS)
        assert all(max(error) <= CLOSE for error in errors.values()), errors


def _compare_experts() -> dict[str, list[float]]:
    group = _start()
    try:
        return {
            name: _compare_stacks(counts * (dist.get_world_size() // 2), group)
            for name, counts in COUNTS.items()
        }
    finally:
        world.stop()


def _compare_stacks(counts: list[list[int]], group: dist.ProcessGroup) -> list[float]:
    """The errors of the outputs, and of the gradients of tokens and parameters."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    alone, own = Experts(4, HIDDEN, INNER, "silu"), Experts(4 // size, HIDDEN, INNER, "silu")
    mine = slice(rank * 4 // size, (rank + 1) * 4 // size)
    with torch.no_grad():
        for full, part in zip(alone.parameters(), own.parameters(), strict=True):
            part.copy_(full.normal_()[mine])
    exchange = ExpertExchange(group)

    inputs = [torch.randn(sum(line), HIDDEN, requires_grad=True) for line in counts]
    outputs = [alone(x, Groups(torch.tensor(n))) for x, n in zip(inputs, counts, strict=True)]
    sum(_loss(output) for output in outputs).backward()
    given = inputs[rank].detach().requires_grad_()
    sent = exchange.send(given, exchange.begin(torch.tensor(counts[rank])))
    found = exchange.give_back(own(*exchange.receive(sent)), sent)
    _loss(found).backward()
    assert all(parameter.grad is not None for parameter in own.parameters())
    pairs = zip(alone.parameters(), own.parameters(), strict=True)
    errors = [error(full.grad[mine], part.grad) for full, part in pairs]
    return [error(outputs[rank], found), error(inputs[rank].grad, given.grad), *errors]


# The balance loss, when the tokens of a row are on several ranks.


@pytest.mark.parametrize(("way", "ranks"), [("ring", 2), ("ulysses", 2), ("both", 4)])
def test_the_balance_loss_counts_the_tokens_of_full_rows(way: str, ranks: int) -> None:
    for worst in run_ranks(ranks, _compare_balance, way):
        assert worst <= CLOSE


def _compare_balance(way: str) -> float:
    """The worst error of the gradients of the balance loss alone."""
    pair = _start(2)
    try:
        cp = ContextParallel(**{way: pair}) if way != "both" else _both(pair)
        alone, shared = _decoder("qwen3_moe"), _decoder("qwen3_moe")
        apply_context_parallel(shared, cp)
        ids, scale, own = tokens(2, 16), torch.tensor(0.7), cp.token_indices(16)
        (alone(ids, balance_scale=scale) * 0.0).sum().backward()
        found = shared(ids[:, own], token_indices=own, total=16, balance_scale=scale)
        (found * 0.0).sum().backward()
        assert alone.model.layers["0"].mlp.gate.weight.grad.abs().max() > 0
        for parameter in shared.parameters():
            dist.all_reduce(parameter.grad)
        return _worst(alone, shared)
    finally:
        world.stop()


def _both(ulysses: dist.ProcessGroup) -> ContextParallel:
    ring, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    return ContextParallel(ulysses=ulysses, ring=ring)


# What runs while tokens are under way.


def test_shared_experts_compute_while_tokens_are_under_way() -> None:
    forward, backward = ["sort", "read", "begin", "shared", "end"], ["begin", "shared grad", "end"]
    again = [event for event in forward if event != "read"]
    for plain, *recomputed in run_ranks(2, _orders_of_events):
        assert plain == forward + backward
        assert recomputed == [forward + again + backward] * 2


def _orders_of_events() -> list[list[str]]:
    """The events in a block of experts, in one that is recomputed, and in one by operation."""
    group = _start()
    try:
        decoder = _decoder("deepseek_v3")
        _keep_own_experts(decoder, group)
        apply_expert_parallel(decoder, group)
        block = next(module for module in decoder.modules() if isinstance(module, MoE))
        again: Any = partial(checkpoint, remembering(block.forward), use_reentrant=False)
        by_operation = partial(
            checkpoint, remembering(block.forward), use_reentrant=False,
            context_fn=partial(keeping, ()),
        )  # fmt: skip
        return [_order_of_events(block, run) for run in (block.forward, again, by_operation)]
    finally:
        world.stop()


def _order_of_events(block: MoE, run: Any) -> list[str]:
    events: list[str] = []
    shared = block.shared_experts
    assert shared is not None
    hooks = [
        shared.register_forward_hook(lambda *_: events.append("shared")),
        shared.register_full_backward_hook(lambda *_: events.append("shared grad")),
    ]
    states = torch.randn(2, 8, 64, requires_grad=True)
    context: Any = SimpleNamespace(balance_scale=None)
    with (
        noted(RowsUnderWay, "begin", events), noted(RowsUnderWay, "end", events),
        noted(HostCopy, "read", events), noted(ExpertExchange, "send", events, name="sort"),
    ):  # fmt: skip
        run(states, context).sum().backward()
    for hook in hooks:
        hook.remove()
    return events


def noted(owner: type, method: str, events: list[str], *, name: str = "") -> Any:
    """Calls of a method of `owner` are added to `events`, in this context."""
    plain = getattr(owner, method)

    def call(*arguments: Any, **keywords: Any) -> Any:
        is_known = isinstance(arguments[0], HostCopy) and arguments[0]._list is not None
        if not is_known:
            events.append(name or method)
        return plain(*arguments, **keywords)

    return patch.object(owner, method, call)
