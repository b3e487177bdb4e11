"""The formulas of the losses on preferences, written down once more in float64; their edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.train.loss import token_loss_sum
from launcher.train.preference import (
    PreferenceLoss,
    PreferenceSettings,
    as_integers,
    from_integers,
    given_of,
    kto_losses,
    pair_losses,
    summary_of,
)

BETA, SMOOTHING, GAMMA = 0.4, 0.1, 0.3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected(loss: str, p: list[float], q: list[float], n: list[int]) -> float:
    """The loss of one pair, after the papers; smoothing where the loss has it."""
    margin = BETA * ((p[0] - q[0]) - (p[1] - q[1]))
    means = [p[0] / n[0], p[1] / n[1]]
    if loss == "simpo":
        margin = BETA * (means[0] - means[1]) - GAMMA
    elif loss == "cpo":
        margin = BETA * (p[0] - p[1])
    if loss in ("dpo", "simpo", "cpo"):
        return -(1 - SMOOTHING) * math.log(sigmoid(margin)) - SMOOTHING * math.log(sigmoid(-margin))
    if loss == "robust":
        right, wrong = -math.log(sigmoid(margin)), -math.log(sigmoid(-margin))
        return ((1 - SMOOTHING) * right - SMOOTHING * wrong) / (1 - 2 * SMOOTHING)
    if loss == "hinge":
        return max(0.0, 1 - margin)
    if loss == "ipo":
        distance = (p[0] - q[0]) / n[0] - (p[1] - q[1]) / n[1]
        return (distance - 1 / (2 * BETA)) ** 2
    odds = [math.exp(m) / (1 - math.exp(m)) for m in means]
    return -BETA * math.log(sigmoid(math.log(odds[0] / odds[1])))


def settings(loss: str, **more: Any) -> PreferenceSettings:
    return PreferenceSettings(
        loss=loss, beta=BETA, label_smoothing=SMOOTHING, simpo_gamma=GAMMA, **more
    )


LOG_P = torch.tensor([[-3.0, -5.0], [-7.5, -2.0], [-0.3, -40.0], [-9.0, -9.0]])
LOG_Q = torch.tensor([[-4.0, -5.5], [-6.0, -3.0], [-1.0, -30.0], [-9.0, -9.0]])
COUNTS = torch.tensor([[2, 3], [5, 1], [4, 8], [3, 3]])
PAIRED = ("dpo", "robust", "ipo", "hinge", "orpo", "simpo", "cpo")


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("loss", PAIRED)
def test_a_loss_is_that_of_its_paper(loss: str, weight: float) -> None:
    found = pair_losses(settings(loss, sft_weight=weight), LOG_P, COUNTS, LOG_Q)
    for index, (p, q, n) in enumerate(
        zip(LOG_P.tolist(), LOG_Q.tolist(), COUNTS.tolist(), strict=True)
    ):
        value = expected(loss, p, q, n) - weight * p[0] / n[0]
        assert found.losses[index].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", PAIRED)
def test_a_pair_without_targets_is_no_sample(loss: str) -> None:
    log_p = LOG_P.clone().requires_grad_()
    counts = COUNTS.clone()
    counts[1, 1] = 0
    found = pair_losses(settings(loss, sft_weight=0.5), log_p, counts, LOG_Q)
    assert found.is_sample.tolist() == [True, False, True, True]
    assert found.losses[1] == 0
    assert not found.measures[1].any()
    found.losses.sum().backward()
    assert log_p.grad is not None
    assert not log_p.grad[1].any()
    assert log_p.grad.isfinite().all()
    metrics = summary_of(settings(loss), found.measures.sum(0).tolist(), 3)
    shown = LOG_P / counts if loss in ("simpo", "orpo") else LOG_P
    assert metrics["logps/chosen"] == pytest.approx(shown[[0, 2, 3], 0].mean().item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(
        metrics["rewards/chosen"] - metrics["rewards/rejected"]
    )


def test_certain_and_impossible_answers_have_finite_gradients() -> None:
    log_p = torch.tensor([[0.0, -1e4], [-1e-9, -1e-9]], requires_grad=True)
    found = pair_losses(settings("orpo", sft_weight=1.0), log_p, COUNTS[:2], LOG_Q[:2])
    found.losses.sum().backward()
    assert found.losses.isfinite().all()
    assert log_p.grad is not None
    assert log_p.grad.isfinite().all()


def test_the_metrics_of_judged_answers_are_means_of_each_kind() -> None:
    good = torch.tensor([True, False, False, True])
    divergence = torch.full((4,), 0.2)
    chosen = settings("kto", desirable_weight=2.0)
    found = kto_losses(chosen, LOG_P[:, 0], COUNTS[:, 0], LOG_Q[:, 0], good, divergence)
    metrics = summary_of(chosen, found.measures.mean(0).tolist(), 1.0)
    rewards = BETA * (LOG_P - LOG_Q)[:, 0]
    assert metrics["kl"] == pytest.approx(0.2)
    assert metrics["rewards/chosen"] == pytest.approx(rewards[good].mean().item())
    assert metrics["rewards/rejected"] == pytest.approx(rewards[~good].mean().item())
    assert metrics["logps/rejected"] == pytest.approx(LOG_P[~good, 0].mean().item())
    bad_only = summary_of(chosen, found.measures[1:3].mean(0).tolist(), 1.0)
    assert "rewards/chosen" not in bad_only
    assert "rewards/margins" not in bad_only


def logits_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (4, 6), generator=generator)
    labels[:, :2] = -100
    labels[1, 4:] = -100
    labels[3] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_float32_sums_over_targets(dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels()
    loss = PreferenceLoss(settings("dpo"), token_loss_sum)
    found, counts = loss.log_probabilities(logits.to(dtype), labels)
    each = logits.to(dtype).float().log_softmax(-1)
    picked = each.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (picked * (labels != -100)).sum(1))
    assert counts.tolist() == [4, 2, 4, 0]
    result = loss(logits, labels, given_of(torch.zeros(4)))
    assert result.is_sample.tolist() == [True, False]


def test_what_is_given_goes_through_integers_unchanged() -> None:
    given = given_of(
        torch.tensor([-3.25, 1e-30, float("nan"), -math.inf]),
        torch.tensor([True, False, True, False]), torch.tensor(0.1),
    )  # fmt: skip
    back = from_integers(as_integers(given))
    assert back.view(torch.int32).equal(given.contiguous().view(torch.int32))
