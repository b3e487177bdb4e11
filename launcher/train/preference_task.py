"""What a step on preferences does before its forward pass: reference and divergence.

Owns where the log-probabilities of the reference come from: computed before training, by row of the
data; or, below adapters, computed in the step by the model without them, so that there is no second
model in memory. Invariant: what is given to the loss is the same on every layout, as the divergence
is a mean over the global batch (in an evaluation over all of the data).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from launcher.data.loader import Batch
from launcher.parallel.world import World
from launcher.train.preference import PreferenceSettings, given_of

if TYPE_CHECKING:
    from launcher.train.run import BuiltModel

ANSWER, MISMATCH = range(2)
"""Indices of the sequences of a row of judged answers."""


@dataclass(frozen=True)
class Prepared:
    """A batch with the log-probabilities that are known before its step."""

    batch: Batch
    """What is trained on: pairs, or the answers alone."""
    log_q: Tensor
    """float32 [rows] on the device: of the rows of the batch under the reference; 0 without one."""
    mismatch: Batch | None = None
    """The mismatched sequences of judged answers."""
    mismatch_log_q: Tensor | None = None
    is_desirable: Tensor | None = None
    """bool [rows] on the device."""

    def given(self, divergence: Tensor | None) -> Tensor:
        """What the loss needs, float32 [rows, columns]."""
        return given_of(self.log_q, self.is_desirable, divergence)


@dataclass(frozen=True)
class PreferenceTask:
    """Training on preferences."""

    settings: PreferenceSettings
    needs_reference: bool
    counts: bool
    """Whether this rank counts scores: one of the ranks that compute the same ones does."""
    scores_before: bool
    """Whether the reference is computed once, before training."""
    without_adapters: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context in which the model is its base alone."""

    def prepared(self, model: BuiltModel, batch: Batch, reference: Tensor | None) -> Prepared:
        """A batch with its log-probabilities under the reference; `reference`: that of
        `TrainRun`."""
        if not self.needs_reference:
            ids = batch.input_ids
            zeros = torch.zeros(ids.shape[:-1].numel(), device=model.batch_sharder.device)
            return Prepared(batch, zeros)
        if self.scores_before:
            log_q = _looked_up(batch, reference, model.batch_sharder.device)
        else:
            with self.without_adapters():
                log_q = self._scores(model, batch)
        if self.settings.is_paired:
            return Prepared(batch, log_q.flatten())
        assert batch.is_desirable is not None
        return Prepared(
            sequence_of(batch, ANSWER), log_q[:, ANSWER],
            sequence_of(batch, MISMATCH), log_q[:, MISMATCH],
            batch.is_desirable.to(log_q.device, non_blocking=True),
        )  # fmt: skip

    def _scores(self, model: BuiltModel, batch: Batch) -> Tensor:
        """Log-probabilities of both sequences of each row, [batch, 2], computed now; zeros on ranks
        without the last stage of a pipeline."""
        if self.settings.is_paired:
            return model.compute.score(model.batch_sharder(batch)).view(-1, 2)
        each = (sequence_of(batch, line) for line in (ANSWER, MISMATCH))
        return torch.stack([model.compute.score(model.batch_sharder(one)) for one in each], 1)

    def score(self, model: BuiltModel, batch: Batch) -> Tensor:
        """The same of the base of the model, zeros on ranks that do not count: the sum over the
        ranks of one data rank are the log-probabilities."""
        with self.without_adapters():
            return self._scores(model, batch) * float(self.counts)

    def divergence(
        self, model: BuiltModel, world: World, parts: Sequence[Prepared], samples: int
    ) -> Tensor | None:
        """k of kto over a global batch of `samples`, a float32 scalar, the same on every rank; None
        for losses on pairs."""
        if self.settings.is_paired:
            return None
        total = sum((self._excess(model, part) for part in parts),
                    torch.zeros((), device=world.device))  # fmt: skip
        return (world.sum(total) / samples).clamp_min(0)

    def divergence_of_data(
        self,
        model: BuiltModel,
        world: World,
        batches: Iterable[Batch],
        reference: Tensor | None,
    ) -> Tensor:
        """The same over all batches of all ranks, without filler."""
        total = torch.zeros(2, device=world.device)
        for batch in batches:
            part = self.prepared(model, batch, reference)
            total[0] += self._excess(model, part)
            if self.counts and model.compute.has_loss:
                total[1] += int((batch.sample_ids >= 0).sum())
        excess, samples = world.sum(total)
        return (excess / samples.clamp_min(1)).clamp_min(0)

    def _excess(self, model: BuiltModel, part: Prepared) -> Tensor:
        """The sum of log p - log q over the mismatched sequences of a batch, filler apart; 0 on
        ranks that do not count it."""
        assert part.mismatch is not None
        assert part.mismatch_log_q is not None
        rows = model.batch_sharder(part.mismatch)
        scores = model.compute.score(rows)
        if not self.counts or not model.compute.has_loss:
            return torch.zeros((), device=scores.device)
        is_sample = (part.mismatch.sample_ids >= 0).to(scores.device, non_blocking=True)
        return torch.where(is_sample, scores - part.mismatch_log_q, 0.0).sum()


def sequence_of(batch: Batch, line: int) -> Batch:
    """One sequence of every row of a batch of preferences."""
    ids, labels = batch.input_ids[:, line], batch.labels[:, line]
    return replace(batch, input_ids=ids, labels=labels)


def _looked_up(batch: Batch, reference: Tensor | None, device: torch.device) -> Tensor:
    """[batch, 2]; 0 for filler."""
    assert reference is not None
    assert batch.rows is not None
    found = reference[batch.rows.clamp_min(0)].to(device, non_blocking=True)
    is_row = (batch.rows >= 0).to(device, non_blocking=True)[:, None]
    return torch.where(is_row, found, 0.0)
