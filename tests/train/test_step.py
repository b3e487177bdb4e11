"""The pieces of a step: loss, gradient norm, clipping, random numbers, state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launcher.errors import UserError
from launcher.parallel.gradients import squared_norm
from launcher.parallel.vocabulary import CHUNK_ELEMENTS
from launcher.train.compute import by_source
from launcher.train.loss import token_loss_sum
from launcher.train.optimizer import clip_gradients
from launcher.train.random import mix, sample_seeds
from launcher.train.state import TrainState, epoch_and_step, from_json, to_json


def test_the_loss_is_summed_over_targets_in_float32() -> None:
    logits = torch.randn(2, 3, 5).bfloat16()
    labels = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    picked = torch.log_softmax(logits.float(), -1)
    expected = -(picked[0, 0, 1] + picked[0, 2, 2] + picked[1, 2, 4])
    result = token_loss_sum(logits, labels)
    assert result.dtype == torch.float32
    assert torch.allclose(result, expected, atol=1e-6)
    assert token_loss_sum(logits, torch.full((2, 3), -100)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_by_row_have_the_same_total_and_gradient(monkeypatch, dtype) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 20)  # pieces that end inside a row
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5).to(dtype)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 4], [0, 3, 2], [-100, -100, -100]])
    one, by_row = (logits.clone().requires_grad_() for _ in range(2))
    total = token_loss_sum(one, labels)
    sums = token_loss_sum(by_row, labels, by_row=True)
    (total * 8).backward()
    (sums.sum() * 8).backward()
    assert torch.equal(by_row.grad, one.grad)
    assert torch.allclose(sums.sum(), total)
    for row in range(4):
        alone = token_loss_sum(logits[row : row + 1], labels[row : row + 1])
        assert torch.allclose(sums[row], alone)
    assert torch.equal(token_loss_sum(logits, labels, by_row=True), sums)  # without gradients
    sources = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    expected = torch.stack([sums[0] + sums[2], sums[1]])
    assert torch.equal(by_source(sums, sources), expected)
    sums = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    assert by_source(sums, sources)[0] == 3


def model_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    model(torch.randn(5, 4)).square().sum().backward()
    return model


def norm_of(model: nn.Module) -> torch.Tensor:
    return squared_norm(model.parameters(), torch.device("cpu")).sqrt()


def test_norm_and_clipping_are_those_of_torch() -> None:
    model, reference = model_with_gradients(), model_with_gradients()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    norm = norm_of(model)
    clip_gradients(model.parameters(), norm, 0.1)
    assert torch.allclose(norm, expected)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad)


def test_a_rank_without_any_element_has_norm_zero() -> None:
    parameter = nn.Parameter(torch.empty(0, 3))
    parameter.grad = torch.empty(0, 3)
    assert squared_norm([parameter], torch.device("cpu")).item() == 0.0
    assert squared_norm([], torch.device("cpu")).item() == 0.0


def test_small_gradients_are_not_scaled_up() -> None:
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    clip_gradients(model.parameters(), norm_of(model), 1e9)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_seeds_depend_on_every_number_and_on_their_order() -> None:
    seen = {mix(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seen) == 64
    assert mix(1, 2) != mix(2, 1)
    assert all(0 <= value < 1 << 63 for value in seen)
    seeds = sample_seeds(3, 5, torch.tensor([9, 10]))
    assert seeds.tolist() == [mix(3, 5, 9), mix(3, 5, 10)]


def test_the_state_survives_its_file_and_scales_with_the_batch() -> None:
    state = TrainState()
    for _ in range(5):
        state.advance(samples=8, tokens=100)
        state.updates += 1
    assert from_json(to_json(state, {"seed": 3}), "x.json") == state
    scaled = state.with_global_batch(4)
    assert (scaled.global_step, scaled.updates, scaled.consumed_samples) == (10, 5, 40)


@pytest.mark.parametrize("value", ["3", None, True])
def test_an_invalid_state_file_is_an_error(value) -> None:
    content = {**to_json(TrainState(), {}), "updates": value}
    with pytest.raises(UserError, match=r"x\.json: updates = .*: it must be a number"):
        from_json(content, "x.json")


@pytest.mark.parametrize(
    ("step", "expected"), [(1, (1, 1)), (10, (1, 10)), (11, (2, 1)), (30, (3, 10))]
)
def test_epochs_and_steps_count_from_one(step: int, expected) -> None:
    assert epoch_and_step(step, 10) == expected
