"""Gradients of replicas: all-reduced, however a gradient is computed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

RANKS = 2
WAYS = ("at once", "accumulated", "sent at the end", "without backward", "unused", "frozen")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    first, second = run_ranks(RANKS, _rank_main)
    assert first == second, "the ranks hold different gradients"
    return first


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_holds_the_sums(outcomes, way: str) -> None:
    for seen, expected in outcomes[way]:
        assert seen == expected


def test_a_bucket_holds_neighbouring_blocks_and_other_parameters_have_their_own(outcomes) -> None:
    assert outcomes["buckets"] == [["last"], ["block 2"], ["block 1", "block 0"], ["first"]]


def test_the_backward_pass_sends_full_buckets_in_order(outcomes) -> None:
    assert outcomes["sent in the backward pass"] == 4
    assert outcomes["sent behind an unused block"] == 2


def _rank_main() -> dict[str, Any]:
    import torch.distributed as dist

    from launcher.parallel import world as worlds

    world = worlds.start(force_cpu=True)
    outcomes: dict[str, Any] = {way: _steps(way, world.rank) for way in WAYS}
    model, sums = _built()
    names = {parameter: name.rsplit(".", 1)[0] for name, parameter in model.named_parameters()}
    outcomes["buckets"] = [
        [names[parameter].replace("_", " ") for parameter in bucket.parameters]
        for bucket in sums._buckets
    ]
    for key, skipped in (("in the backward pass", None), ("behind an unused block", "block_1")):
        sums.sync = True
        _loss(model, 1.0, skipped).backward()
        outcomes[f"sent {key}"] = sums._sent
        sums.finish()
    dist.barrier()
    worlds.stop()
    return outcomes


def _built() -> tuple[Any, Any]:
    import torch
    from torch import nn

    from launcher.layout.mesh import Mesh
    from launcher.parallel.grad_all_reduce import make_grad_all_reduce
    from launcher.parallel.meshes import Meshes

    torch.manual_seed(1)
    names = ("first", "block_0", "block_1", "block_2", "last")
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in names})
    blocks = [model[name] for name in names[1:4]]
    meshes = Meshes(Mesh(dp_replicate=RANKS), "cpu")
    return model, make_grad_all_reduce([model], blocks, meshes, together=2)


def _loss(model: Any, scale: float, skipped: str | None = None) -> Any:
    import torch

    states = torch.ones(2, 3) * scale
    for name, layer in model.items():
        if name != skipped:
            states = layer(states)
    return states.sum()


def _steps(way: str, rank: int) -> list[tuple[list[float], list[float]]]:
    """(gradients of all parameters, what they should be) of two steps."""
    import torch

    model, sums = _built()
    if way == "frozen":
        model["block_1"].weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for step in (1.0, 2.0):
        skipped = "block_1" if way == "unused" else None
        expected = torch.autograd.grad(
            sum(_loss(model, step * (1 + other), skipped) for other in range(RANKS)),
            parameters, allow_unused=True,
        )  # fmt: skip
        _backward(way, model, parameters, sums, step * (1 + rank))
        sums.finish()
        results.append((
            [round(v, 3) for p in parameters for v in p.grad.flatten().tolist()],
            [
                round(v, 3)
                for p, g in zip(parameters, expected, strict=True)
                for v in (torch.zeros_like(p) if g is None else g).flatten().tolist()
            ],
        ))  # fmt: skip
        model.zero_grad(set_to_none=True)
    return results


def _backward(way: str, model: Any, parameters: list[Any], sums: Any, scale: float) -> None:
    import torch

    if way == "without backward":
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(_loss(model, scale), parameters), strict=True
        ):
            parameter.grad = gradient
        return
    if way == "accumulated":
        sums.sync = False
        for _ in range(2):
            (_loss(model, scale) / 4).backward()
        sums.sync = True
        (_loss(model, scale) / 2).backward()
        return
    sums.sync = way != "sent at the end"
    _loss(model, scale, "block_1" if way == "unused" else None).backward()
