"""One optimizer step: forward and backward over the micro-batches, clip, update.

Invariant: nothing here waits for the device, except where the loss is scaled: whether a step
overflowed is read before anything is updated. What the step measured comes back as one small tensor
that the loop reads when it wants to know.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.data.loader import Batch, StepData
from launcher.train.compute import MicroBatch
from launcher.train.optimizer import clip_gradients
from launcher.train.random import mix, sample_seeds
from launcher.train.scaling import unscale_gradients

if TYPE_CHECKING:
    from launcher.train.run import TrainRun

LOSS, SQUARED_NORM, SIGNALS_FROM = range(3)
"""Places in the tensor the ranks add up in a step; from `SIGNALS_FROM` on, the ranks that have each
of `WISHES`. In what a step returns, the norm stands where its square stood."""
GRADIENT_NORM = SQUARED_NORM


@dataclass(frozen=True)
class Limits:
    """The gradient norm and the loss from which on a step is not sound."""

    norm: float
    loss: float
    skips: bool
    """Whether such a step changes nothing."""

    def are_passed(self, norm: float, loss: float) -> bool:
        """Whether one is too large, or no number."""
        return not (norm < self.norm and loss < self.loss)


def train_step(run: TrainRun, data: StepData, learning_rate: float) -> torch.Tensor:
    """Train on one global batch. Returns float32 [loss, gradient norm, ranks per wish to stop...],
    and last, where it is watched, the norm of the embedding's gradient.

    The loss is the mean over the target tokens of the global batch, the same on every rank. Loss
    and norm are those without a loss scale. A step that overflowed changes no parameter, moment or
    update count, only the scale. Its data is used up, as in the original, and the learning rate
    goes on (there it waits): a step is a place in the data and on the curve, updated or not.
    """
    targets = max(data.target_tokens, 1)
    run.parts.train()
    rows = [micro_batch_of(run, batch) for batch in data.batches]
    loss_sum = run.compute.train(rows, run.state.loss_scale / targets)
    run.gradients.finish()
    if run.scaling is not None:
        unscale_gradients(run.parameters, run.state.loss_scale)
    requests = torch.tensor(run.interrupts.as_values()).to(run.world.device, non_blocking=True)
    own = torch.stack([loss_sum / targets, run.gradients.squared_norm()])
    watched = run.gradients.squared_norm_of_embedding()
    grad_all_reduce = run.world.sum(
        torch.cat([own, requests, *([] if watched is None else [watched])])
    )
    norm = grad_all_reduce[SQUARED_NORM].sqrt_()
    if watched is not None:
        grad_all_reduce[-1].sqrt_()
    if not (_overflowed(run, norm) or _is_skipped(run, grad_all_reduce)):
        _update(run, norm, learning_rate)
    run.optimizer.zero_grad()
    return grad_all_reduce


def _overflowed(run: TrainRun, norm: torch.Tensor) -> bool:
    """Whether the step is to be skipped; moves the loss scale. Never without a loss scale."""
    if run.scaling is None:
        return False
    overflow = run.scaling.overflowed(norm)
    run.scaling.move(run.state, overflow)
    return overflow


def _is_skipped(run: TrainRun, grad_all_reduce: torch.Tensor) -> bool:
    """Whether limits are passed, where there are any. The host waits for the sums then."""
    if run.limits is None or not run.limits.skips:
        return False
    loss, norm = grad_all_reduce[: SQUARED_NORM + 1].tolist()
    return run.limits.are_passed(norm, loss)


def _update(run: TrainRun, norm: torch.Tensor, learning_rate: float) -> None:
    """Clip the gradients and let the optimizer use them."""
    if run.max_gradient_norm is not None:
        clip_gradients(run.parameters, norm, run.max_gradient_norm)
    run.is_consistent = False
    run.optimizer.step(learning_rate)
    run.state.updates += 1
    run.is_consistent = True


def micro_batch_of(run: TrainRun, batch: Batch) -> MicroBatch:
    """One micro-batch on the device, with what training has beside: seeds, the balance loss."""
    more: dict[str, Any] = {}
    if run.balance is not None:
        more["balance_scale"] = run.balance * run.state.loss_scale
    if run.has_dropout:
        step = run.state.global_step
        more["seeds"] = sample_seeds(run.seed, step, batch.sample_ids)
        more["seed"] = mix(run.seed, step, int(batch.sample_ids[0]))
    return run.batch_sharder(batch, **more)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What is known of one optimizer step after it; one row of `metrics.jsonl`."""

    step: int
    """Optimizer step over the whole run, from 1."""
    epoch: int
    step_in_epoch: int
    loss: float
    """Mean over target tokens, nats."""
    lr: float
    grad_norm: float
    tokens: int
    """Tokens of the global batch, padding apart."""
    tokens_per_second: float
    """Over all ranks."""
    consumed_samples: int
    seconds: float
    loss_scale: float | None = None
    """What the loss of the step was multiplied by; None: the loss is not scaled."""
    overflow: bool | None = None
    """Whether the step was skipped; None: the loss is not scaled."""
    skipped: bool | None = None
    """Whether it changed nothing because limits were passed; None: there are none."""
    embedding_norm: float | None = None
    """Of the embedding's gradient; None: it is not watched."""

    @property
    def changed_nothing(self) -> bool:
        """Whether the step was left out."""
        return bool(self.overflow or self.skipped)

    def as_row(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        return {key: value for key, value in asdict(self).items() if value is not None}
