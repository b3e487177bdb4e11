"""Moments with a dtype of their own: values, rounding, resumes, and the bytes of a save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.train import moments
from launcher.train.moments import random_bits, rounded, seed_of
from tests.train.test_optimizer import (
    RATE,
    SETTINGS,
    built,
    model,
    section,
    state,
    take_gradients,
    train,
)

WITH_STATE = [setting for setting in SETTINGS if setting != "SGD"]


def adam_in_a_loop(module: nn.Module, steps: int, *, decoupled: bool) -> dict[str, Tensor]:
    """Adam in float64 whose moments are rounded to bfloat16."""
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        take_gradients(module, step)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            gradient, weight = parameter.grad.double(), weights[name]
            decay = 0.5 if parameter.ndim > 1 else 0.0
            if decoupled:
                weight = weight * (1 - RATE * decay)
            else:
                gradient = gradient + decay * weight
            mean = 0.8 * first[name] + 0.2 * gradient
            square = 0.9 * second[name] + 0.1 * gradient**2
            size = (square / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6
            weights[name] = weight - RATE / (1 - 0.8 ** (step + 1)) * mean / size
            index = torch.arange(weight.numel())
            bits = random_bits(index, seed_of(name, step + 1)).view_as(weight)
            first[name] = rounded(mean.float(), torch.bfloat16, bits).double()
            second[name] = rounded(square.float(), torch.bfloat16, bits >> 16).double()
    return weights


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_adam_is_that_of_a_plain_loop(kind: str) -> None:
    module, reference = model(), model()
    train(module, built(module, section(kind, state_dtype="bfloat16")), range(6))
    expected = adam_in_a_loop(reference, 6, decoupled=kind == "AdamW")
    for name, parameter in module.named_parameters():
        # A moment at the edge of a rounding interval may go to the other neighbour.
        assert torch.allclose(parameter.double(), expected[name], atol=2e-4), name


@pytest.mark.parametrize("setting", WITH_STATE)
def test_float32_moments_of_bfloat16_weights_are_those_of_float32_weights(setting: str) -> None:
    narrow, wide = model(torch.bfloat16), model()
    optimizer = built(narrow, section(setting, state_dtype="float32"))
    reference = built(wide, section(setting))
    with torch.no_grad():
        for mine, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
            theirs.copy_(mine)
    take_gradients(narrow, 0)
    for mine, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert mine.grad is not None
        theirs.grad = mine.grad.float()
    optimizer.step(0.0)  # so that weights do not move apart
    reference.step(0.0)
    kept, expected = state(narrow, optimizer), state(wide, reference)
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    for name, tensor in kept.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("setting", WITH_STATE)
def test_a_resume_continues_bit_by_bit(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = section(setting, state_dtype="bfloat16")
    whole, stopped, resumed = model(), model(), model()
    at_once = built(whole, config)
    train(whole, at_once, range(5))
    before = built(stopped, config)
    train(stopped, before, range(2))
    resumed.load_state_dict(stopped.state_dict())
    after = built(resumed, config)
    after.allocate_state(dict(resumed.named_parameters()))
    saved = state(stopped, before)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name, tensor in state(resumed, after).items():
        tensor.copy_(saved[name])
    after.set_updates(2)
    monkeypatch.setattr(moments, "CHUNK", 5)  # the pieces of a tensor do not change a bit
    train(resumed, after, range(2, 5))
    for name, tensor in state(whole, at_once).items():
        assert torch.equal(tensor, state(resumed, after)[name]), name
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_second_moment_follows_small_changes() -> None:
    """With beta2 = 0.999 rounding to nearest would leave it where it is for ever."""
    module = nn.Linear(64, 64, bias=False)
    optimizer = built(module, section("AdamW", state_dtype="bfloat16", betas=[0.9, 0.999]))
    for _ in range(400):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step(0.0)
    (square,) = (t for name, t in state(module, optimizer).items() if name.startswith("adam_v"))
    assert square.float().mean().item() == pytest.approx(1 - 0.999**400, rel=0.01)


def test_rounding_keeps_the_mean_and_what_is_not_finite() -> None:
    values = torch.tensor([1.0, 1.001, -1.001, 3e-40, 0.0]).repeat(20_000, 1)
    bits = random_bits(torch.arange(values.numel()), 7).view_as(values)
    result = rounded(values, torch.bfloat16, bits)
    assert torch.equal(rounded(values, torch.float32, bits), values)
    near = (result.float() - values).abs() <= values.abs() / 128
    assert bool(near[:, :3].all())
    assert torch.allclose(result.double().mean(0), values[0].double(), rtol=2e-4, atol=1e-41)
    special: Any = torch.tensor([0x7FFFFFFF, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    special = special.view(torch.float32)
    kept = rounded(special, torch.bfloat16, torch.full((4,), 0xFFFF))
    assert kept.isnan().tolist() == [True, True, False, False]
    assert kept[2:].tolist() == [float("inf"), float("-inf")]


def test_bytes_of_an_element() -> None:
    assert built(model(), section("AdamW", state_dtype="bfloat16")).state_itemsize(4) == 2
    assert (
        built(model(torch.bfloat16), section("Muon", state_dtype="float32")).state_itemsize(2) == 4
    )
    assert built(model(), section("AdamW")).state_itemsize(4) == 4


def test_the_update_compiles_once_for_all_shapes() -> None:
    graphs = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    results = []
    for compiled in (None, lambda f: torch.compile(f, backend=counted, dynamic=True)):
        parameters = [nn.Parameter(torch.linspace(-1, 1, size)) for size in (40, 12, 77)]
        groups = [{"params": [(f"p{i}", p) for i, p in enumerate(parameters)]}]
        adam = moments.Adam(
            groups, torch.bfloat16, betas=(0.9, 0.99), eps=1e-8, decoupled=True, compiled=compiled
        )
        for step in range(3):
            for parameter in parameters:
                parameter.grad = parameter.detach() * (step - 1)
            adam.param_groups[0]["lr"] = 0.1 / (step + 1)
            adam.step()
        results.append([p.detach() for p in parameters])
    assert all(map(torch.equal, *results))
    assert len(graphs) == 1
