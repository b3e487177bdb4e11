"""One optimizer step: forward and backward over the micro-batches, clip, update.

Invariant: nothing here waits for the device. What the step measured comes back as one small tensor
that the loop reads when it wants to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.data.loader import Batch, StepData
from launcher.train.compute import Rows
from launcher.train.optimizer import clip_gradients, set_learning_rate
from launcher.train.random import mix, sample_seeds

if TYPE_CHECKING:
    from launcher.train.run import TrainRun

LOSS, SQUARED_NORM, SIGNALS_FROM = range(3)
"""Places in the tensor the ranks add up in a step; from `SIGNALS_FROM` on, the ranks that got each
signal. In what a step returns, the norm stands where its square stood."""
GRADIENT_NORM = SQUARED_NORM


def train_step(run: TrainRun, data: StepData, learning_rate: float) -> torch.Tensor:
    """Train on one global batch. Returns float32 [loss, gradient norm, ranks per signal...].

    The loss is the mean over the target tokens of the global batch, the same on every rank.
    """
    targets = max(data.target_tokens, 1)
    run.parts.train()
    rows = [training_rows(run, batch) for batch in data.batches]
    loss_sum = run.compute.train(rows, 1.0 / targets)
    run.gradients.finish()
    requests = torch.tensor(run.interrupts.as_values()).to(run.world.device, non_blocking=True)
    own = torch.stack([loss_sum / targets, run.gradients.squared_norm()])
    sums = run.world.sum(torch.cat([own, requests]))
    norm = sums[SQUARED_NORM].sqrt_()
    if run.max_gradient_norm is not None:
        clip_gradients(run.parameters, norm, run.max_gradient_norm)
    set_learning_rate(run.optimizer, learning_rate)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return sums


def training_rows(run: TrainRun, batch: Batch) -> Rows:
    """One micro-batch on the device, with the seeds of its samples where there is dropout."""
    if not run.has_dropout:
        return run.row_cut(batch)
    step = run.state.global_step
    return run.row_cut(
        batch,
        seeds=sample_seeds(run.seed, step, batch.sample_ids),
        seed=mix(run.seed, step, int(batch.sample_ids[0])),
    )


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
