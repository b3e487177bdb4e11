"""Losses on preferences, as functions of the log-probabilities of sequences.

Owns the formulas. `log p` is the sum of the log-probabilities of the target tokens of a sequence
and `n` their number; chosen c, rejected r; the reference has log-probabilities q. With
d = (log p_c - log q_c) - (log p_r - log q_r), s(x) = log sigmoid(x), label smoothing e:

    dpo     -(1 - e) s(b d) - e s(-b d)                        Rafailov et al., 2023; Mitchell, 2023
    robust  (-(1 - e) s(b d) + e s(-b d)) / (1 - 2 e)          Chowdhury et al., 2024
    hinge   max(0, 1 - b d)                                    Zhao et al., 2023 (SLiC)
    ipo     (d' - 1 / (2 b))^2, d' of means over tokens        Azar et al., 2023
    simpo   as dpo, of b (m_c - m_r) - gamma, m = log p / n    Meng et al., 2024
    cpo     as dpo, of b (log p_c - log p_r)                   Xu et al., 2024
    orpo    -b s(o_c - o_r), o = m - log(1 - exp(m))           Hong et al., 2024
    kto     w (1 - sigmoid(+-(b (log p - log q) - b k)))       Ethayarajh et al., 2024

`sft_weight` adds -m_c of every pair: the mean over tokens, then over pairs. k of kto is the mean of
log p - log q over mismatched prompts and answers of the global batch, at least 0.

Invariants: all of it in float32; every loss is a sum over samples, divided by the samples of the
global batch elsewhere, so that it is the same on every layout; a sample with a sequence without
targets (filler) has the loss 0 and counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from launcher.parallel.collectives import all_reduce
from launcher.parallel.vocabulary import IGNORED_LABEL
from launcher.train.loss import Loss

USUAL_BETA = 0.1
SIMPO_BETA = 2.0
PAIR_MEASURES = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"),
    *("logps/rejected", "nll_loss", "log_odds_chosen", "log_odds_ratio"),
)
KTO_MEASURES = (
    *("count/chosen", "count/rejected", "rewards/chosen", "rewards/rejected", "logps/chosen"),
    *("logps/rejected", "kl"),
)


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """Which loss, and its numbers; the keys of `preference` with their defaults filled in."""

    loss: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def is_paired(self) -> bool:
        """Whether a sample is two sequences that are compared."""
        return self.loss != "kto"

    @property
    def uses_means(self) -> bool:
        """Whether rewards and log-probabilities are means over tokens."""
        return self.loss in ("simpo", "orpo")

    @property
    def measures(self) -> tuple[str, ...]:
        """What is summed beside the losses, in this order."""
        return PAIR_MEASURES if self.is_paired else KTO_MEASURES


class Measured(NamedTuple):
    """Of some samples."""

    losses: Tensor
    """float32 [samples], with gradients."""
    is_sample: Tensor
    """bool [samples]: whether all sequences have targets."""
    measures: Tensor
    """float32 [samples, PreferenceSettings.measures], without gradients; 0 for what is no
    sample."""


def pair_losses(
    settings: PreferenceSettings, log_p: Tensor, counts: Tensor, log_q: Tensor
) -> Measured:
    """The losses of pairs. `log_p`, `log_q` float32 [samples, 2]: chosen, rejected, under the model
    and the reference (not used without one); `counts` int64 [samples, 2] their target tokens."""
    is_sample = (counts > 0).all(1)
    means = log_p / counts.clamp_min(1)
    losses, odds = _pair_formula(settings, log_p, means, log_q, counts)
    if settings.sft_weight:
        losses = losses - settings.sft_weight * means[:, 0]
    shown = (means if settings.uses_means else log_p).detach()
    has_reference = settings.loss in ("dpo", "robust", "ipo", "hinge")
    rewards = settings.beta * (shown - log_q if has_reference else shown)
    columns = [
        rewards[:, 0], rewards[:, 1], (rewards[:, 0] > rewards[:, 1]).float(),
        shown[:, 0], shown[:, 1], -means[:, 0].detach(),
        odds.detach(), F.logsigmoid(odds.detach()),
    ]  # fmt: skip
    return _of_samples(losses, is_sample, torch.stack(columns, 1))


def _pair_formula(
    settings: PreferenceSettings, log_p: Tensor, means: Tensor, log_q: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses, and the log odds ratio of orpo (else zeros)."""
    beta, zeros = settings.beta, torch.zeros_like(log_p[:, 0])
    difference = _difference(log_p - log_q)
    match settings.loss:
        case "dpo":
            return _smoothed(settings, beta * difference), zeros
        case "robust":
            e, margin = settings.label_smoothing, beta * difference
            both = -(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)
            return both / (1 - 2 * e), zeros
        case "hinge":
            return torch.relu(1 - beta * difference), zeros
        case "ipo":
            of_means = _difference((log_p - log_q) / counts.clamp_min(1))
            return (of_means - 1 / (2 * beta)) ** 2, zeros
        case "simpo":
            margin = beta * _difference(means) - settings.simpo_gamma
            return _smoothed(settings, margin), zeros
        case "cpo":
            return _smoothed(settings, beta * _difference(log_p)), zeros
        case "orpo":
            odds = _difference(means - _log1mexp(means))
            return -beta * F.logsigmoid(odds), odds
    raise ValueError(f"no loss on pairs: {settings.loss}")


def _difference(of_both: Tensor) -> Tensor:
    return of_both[:, 0] - of_both[:, 1]


def _smoothed(settings: PreferenceSettings, margin: Tensor) -> Tensor:
    e = settings.label_smoothing
    loss = -F.logsigmoid(margin)
    return loss if not e else (1 - e) * loss - e * F.logsigmoid(-margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 (Maechler, 2012), finite where x rounds to 0. The branches are
    selected before the logarithm, so that no gradient is that of a branch not taken."""
    x = x.clamp_max(-torch.finfo(torch.float32).tiny)
    near = x > -0.6931471805599453
    far = torch.where(near, torch.full_like(x, -1.0), x)
    close = torch.where(near, x, torch.full_like(x, -0.5))
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def kto_losses(
    settings: PreferenceSettings,
    log_p: Tensor,
    counts: Tensor,
    log_q: Tensor,
    is_desirable: Tensor,
    divergence: Tensor,
) -> Measured:
    """The losses of judged answers: all float32 [samples], but bool `is_desirable` and int64
    `counts`. `divergence`: k of the formula, the same for each."""
    ratios = log_p - log_q
    signed = torch.where(is_desirable, ratios - divergence, divergence - ratios)
    weights = torch.where(is_desirable, settings.desirable_weight, settings.undesirable_weight)
    losses = weights * (1 - torch.sigmoid(settings.beta * signed))
    good, rewards = is_desirable.float(), settings.beta * ratios.detach()
    columns = [good, 1 - good, good * rewards, (1 - good) * rewards, good * log_p.detach(),
               (1 - good) * log_p.detach(), divergence]  # fmt: skip
    return _of_samples(losses, counts > 0, torch.stack(columns, 1))


def _of_samples(losses: Tensor, is_sample: Tensor, measures: Tensor) -> Measured:
    """Without what is no sample; not a product, as a loss that is not finite times 0 is no 0."""
    return Measured(
        torch.where(is_sample, losses, losses.new_zeros(())),
        is_sample,
        torch.where(is_sample[:, None], measures, measures.new_zeros(())),
    )


def summary_of(
    settings: PreferenceSettings, sums: Sequence[float], samples: float
) -> dict[str, float]:
    """The metrics, with the names of TRL, from the sums (or shares, with `samples` in the same
    unit) of `settings.measures`."""
    found = dict(zip(settings.measures, sums, strict=True))
    if settings.is_paired:
        metrics = {name: value / max(samples, 1e-30) for name, value in found.items()}
        if not settings.sft_weight:
            del metrics["nll_loss"]
        if settings.loss != "orpo":
            del metrics["log_odds_chosen"], metrics["log_odds_ratio"]
    else:
        metrics = {"kl": found["kl"] / max(samples, 1e-30)}
        for kind in ("chosen", "rejected"):
            count = found[f"count/{kind}"]
            if count:
                metrics |= {
                    f"{name}/{kind}": found[f"{name}/{kind}"] / count
                    for name in ("rewards", "logps")
                }
    if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


@dataclass(frozen=True)
class PreferenceLoss:
    """From the logits of the sequences of a micro-batch to the losses of its samples."""

    settings: PreferenceSettings
    token_loss: Loss
    """Sums of cross entropy: of all columns of the logits, or those of this rank."""
    context_groups: tuple[dist.ProcessGroup, ...] = ()
    """The axes of the ranks with the other tokens of the same sequences."""

    @property
    def sequences(self) -> int:
        """Sequences of a sample in a micro-batch."""
        return 2 if self.settings.is_paired else 1

    @property
    def columns(self) -> int:
        """Sums of a batch: of losses, of samples, and of the measures."""
        return 2 + len(self.settings.measures)

    def log_probabilities(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The summed log-probability of the targets of each sequence, float32 [rows], with
        gradients; and the number of targets, int64 [rows]. Over all tokens and all columns."""
        sums = -self.token_loss(logits, labels, by_row=True)
        counts = (labels != IGNORED_LABEL).sum(1)
        for group in self.context_groups:
            sums = all_reduce(sums, group)
            dist.all_reduce(counts, group=group)
        return sums, counts

    def __call__(self, logits: Tensor, labels: Tensor, given: Tensor) -> Measured:
        """The losses of a micro-batch; `given`: what `given_of` returns."""
        log_p, counts = self.log_probabilities(logits, labels)
        log_q = given[:, 0]
        if self.settings.is_paired:
            pairs = (tensor.view(-1, 2) for tensor in (log_p, counts, log_q))
            return pair_losses(self.settings, *pairs)
        return kto_losses(self.settings, log_p, counts, log_q, given[:, 1] > 0, given[:, 2])


def given_of(
    log_q: Tensor, is_desirable: Tensor | None = None, divergence: Tensor | None = None
) -> Tensor:
    """What a loss needs beside logits and labels, as float32 [rows, 1 or 3]: the log-probability
    under the reference (zeros without one) and, of judged answers, the judgement and k of the
    formula (a scalar)."""
    if is_desirable is None:
        return log_q[:, None]
    assert divergence is not None
    return torch.stack([log_q, is_desirable.float(), divergence.expand_as(log_q)], 1)


def as_integers(given: Tensor) -> Tensor:
    """float32 as int64 of the same bits, to be carried with labels through a pipeline."""
    return given.contiguous().view(torch.int32).long()


def from_integers(carried: Tensor) -> Tensor:
    """The inverse of `as_integers`."""
    return carried.to(torch.int32).view(torch.float32)
