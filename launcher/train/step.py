"""One optimizer step: forward and backward over the micro-batches, clip, update.

Invariant: nothing here waits for the device. What the step measured comes back as one small tensor
that the loop reads when it wants to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.data.loader import Batch, StepData
from launcher.parallel.apply import sync_gradients
from launcher.parallel.world import repeatable_backward
from launcher.train.loss import token_loss_sum
from launcher.train.optimizer import clip_gradients, gradient_norm, set_learning_rate
from launcher.train.random import mix, sample_seeds

if TYPE_CHECKING:
    from launcher.train.run import TrainRun

LOSS, GRADIENT_NORM, SIGNALS_FROM = range(3)
"""Places in the tensor a step returns; from `SIGNALS_FROM` on, the ranks that got each signal."""


def train_step(run: TrainRun, data: StepData, learning_rate: float) -> torch.Tensor:
    """Train on one global batch. Returns float32 [loss, gradient norm, ranks per signal...].

    The loss is the mean over the target tokens of the global batch, the same on every rank.
    """
    targets = max(data.target_tokens, 1)
    # FSDP averages gradients over the data-parallel ranks: their number makes it a sum again.
    scale = run.mesh.data_parallel / targets
    loss_sum = torch.zeros((), device=run.world.device)
    run.model.train()
    for index, batch in enumerate(data.batches):
        sync_gradients(run.model, index == len(data.batches) - 1)
        loss = batch_loss(run, batch)
        with repeatable_backward(run.world.device, strict=run.own_kernels):
            (loss * scale).backward()
        loss_sum += loss.detach()
    requests = torch.tensor(run.interrupts.as_values()).to(run.world.device, non_blocking=True)
    loss_mean, *stop = run.world.sum(torch.cat([loss_sum[None] / targets, requests])).unbind()
    parameters = run.parameters
    norm = gradient_norm(parameters, run.shard_group)
    if run.max_gradient_norm is not None:
        clip_gradients(parameters, norm, run.max_gradient_norm)
    set_learning_rate(run.optimizer, learning_rate)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss_mean, norm, *stop])


def batch_loss(run: TrainRun, batch: Batch) -> torch.Tensor:
    """Summed loss of one micro-batch of this rank, in training or evaluation mode of the model."""
    device = run.world.device
    seeds = None
    if run.model.training and run.has_dropout:
        seeds = sample_seeds(run.seed, run.state.global_step, batch.sample_ids)
        # Modules of transformers draw dropout from torch's own generator.
        torch.manual_seed(mix(run.seed, run.state.global_step, int(batch.sample_ids[0])))
    logits = run.model(
        batch.input_ids.to(device, non_blocking=True),
        position_ids=_moved(batch.position_ids, device),
        document_ids=_moved(batch.document_ids, device),
        sample_seeds=_moved(seeds, device),
    )
    return token_loss_sum(logits, batch.labels.to(device, non_blocking=True))


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


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
