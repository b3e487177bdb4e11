"""From batches to losses and gradients, on any layout.

Owns the forward and the backward pass of a step, in two forms: all layers on every rank (with
tensor, context and expert parallelism), micro-batch after micro-batch; or the stages of a pipeline,
all micro-batches in one schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.data.loader import Batch
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.pipeline import BY_ROW, Pipeline, kept_on_host
from launcher.report import ranges
from launcher.report.ranges import named_range
from launcher.train.head_loss import HeadLoss
from launcher.train.loss import Loss
from launcher.train.preference import PreferenceLoss, as_integers, from_integers


@dataclass(frozen=True)
class MicroBatch:
    """One batch on the device: the input of a model, and its labels."""

    input_ids: Tensor
    labels: Tensor
    arguments: dict[str, Any]
    """Further arguments of `Decoder.forward`."""
    seed: int | None = None
    """For modules of transformers, whose dropout uses torch's global generator."""
    sources: Tensor | None = None
    """bool [batch, sources]: whether a row is of a source; None where the data is no mixture."""
    given: Tensor | None = None
    """float32 [batch, columns]: what a loss on preferences needs beside logits and labels
    (`preference.given_of`); None for the loss on tokens."""


@dataclass(frozen=True)
class BatchSharder:
    """Selects the tokens of this rank from every row."""

    device: torch.device
    token_indices: Callable[[int], Tensor] | None = None
    """From the length of a row to the indices of this rank's tokens, on the device; None: all of
    them."""
    counts: bool = True
    """Whether this rank counts its tokens: tensor- and pipeline-parallel ranks hold the same ones,
    and one of them counts."""

    def __call__(
        self, batch: Batch, *, seeds: Tensor | None = None, seed: int | None = None, **more: Any
    ) -> MicroBatch:
        """The rows of `batch` on the device, with the tokens of this rank alone; the sequences of a
        sample of preferences are rows one after another. `seeds`: of every row."""
        tensors = {"position_ids": batch.position_ids, "document_ids": batch.document_ids,
                   "sample_seeds": seeds}  # fmt: skip
        ids, labels = self._moved(batch.input_ids), self._moved(batch.labels)
        sources = None if batch.sources is None else self._moved(batch.sources)
        if ids.dim() == 3:
            if sources is not None:
                sources = sources.repeat_interleave(ids.shape[1], 0)
            ids, labels = ids.flatten(0, 1), labels.flatten(0, 1)
        arguments = {k: self._moved(v) for k, v in tensors.items() if v is not None}
        if batch.document_lengths is not None:
            arguments["document_lengths"] = batch.document_lengths  # stays on the host
        if self.token_indices is not None:
            total = ids.shape[1]
            token_indices = self.token_indices(total)
            ids, labels = ids[:, token_indices], labels[:, token_indices]
            if "position_ids" in arguments:
                arguments["position_ids"] = arguments["position_ids"][:, token_indices]
            more |= {"token_indices": token_indices, "total": total}
        return MicroBatch(ids, labels, arguments | more, seed, sources)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class Compute(Protocol):
    """Computes losses and gradients."""

    @property
    def has_loss(self) -> bool:
        """Whether this rank has the last layers, and so the loss."""
        ...

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        """Forward and backward of all micro-batches; gradients are those of `scale` times the sum
        of losses. Returns this rank's part of the sum, without the scale: a float32 scalar, or
        the sum of each source, [sources]; of preferences [sources or 1, PreferenceLoss.columns]."""

    def evaluate(self, rows: MicroBatch) -> Tensor:
        """This rank's part of the summed loss of one batch, as from `train`; no gradients."""

    def score(self, rows: MicroBatch) -> Tensor:
        """The summed log-probability of the targets of each row, float32 [batch], in evaluation
        mode, without gradients; zeros on ranks without the last stage. For preferences only."""


def by_source(row_losses: Tensor, sources: Tensor) -> Tensor:
    """The sums of `row_losses` [batch] over the rows of each source of `sources` [batch, sources].

    Not a product, so that a loss that is not finite stays with its source, and not `index_add_`,
    whose order of additions varies on a GPU.
    """
    own = row_losses.detach()[:, None]
    return torch.where(sources, own, own.new_zeros(())).sum(0)


def objective_of(
    loss: Loss, output: Tensor, labels: Tensor, sources: Tensor | None, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`scale` times the summed loss of a batch, whose gradients are those of a step; and without
    gradients and scale what `Compute.train` adds up. `output`: what `loss` takes."""
    by_row = sources is not None
    if isinstance(loss, HeadLoss):
        objective, sums = loss.objective(output, labels, scale, by_row=by_row)
    else:
        found = loss(output, labels, by_row=by_row)
        objective, sums = (found.sum() if by_row else found) * scale, found.detach()
    return objective, sums if sources is None else by_source(sums, sources)


@dataclass(frozen=True)
class FullModel:
    """Every rank computes all layers."""

    parts: ModelParts
    loss: Loss
    counts: bool
    """Whether this rank counts the loss: all tensor-parallel ranks have it, and one counts."""
    preference: PreferenceLoss | None = None
    """The loss on preferences; None: that on tokens."""

    @property
    def has_loss(self) -> bool:
        return True

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        shape = _shape_of_sums(rows[0], self.preference)
        total = torch.zeros(shape, device=rows[0].input_ids.device)
        for index, batch in enumerate(rows):
            self.parts.sync_gradients(index == len(rows) - 1)
            with named_range(ranges.FORWARD):
                objective, sums = self._objective(batch, scale)
            with named_range(ranges.BACKWARD):
                objective.backward()
            total += sums
        return total * float(self.counts)

    def evaluate(self, rows: MicroBatch) -> Tensor:
        _, sums = self._objective(rows, 1.0)
        return sums * float(self.counts)

    def _objective(self, rows: MicroBatch, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """As `objective_of`."""
        output = self._output(rows)
        if self.preference is not None:
            assert rows.given is not None
            loss, sums = _preferences(
                self.preference, output, rows.labels, rows.given, rows.sources
            )
            return loss * scale, sums
        return objective_of(self.loss, output, rows.labels, rows.sources, scale)

    @torch.no_grad()
    def score(self, rows: MicroBatch) -> Tensor:
        assert self.preference is not None
        was_training = self.parts.training
        self.parts.train(False)
        scores, _ = self.preference.log_probabilities(self._output(rows), rows.labels)
        self.parts.train(was_training)
        return scores

    def _output(self, rows: MicroBatch) -> Tensor:
        """What the loss takes: logits, or the input of the head."""
        if rows.seed is not None:
            torch.manual_seed(rows.seed)
        output: Tensor = self.parts.modules[0](rows.input_ids, **kept_on_host(rows.arguments))
        return output


def _shape_of_sums(rows: MicroBatch, preference: PreferenceLoss | None) -> tuple[int, ...]:
    sources = () if rows.sources is None else (rows.sources.shape[1],)
    return sources if preference is None else (*(sources or (1,)), preference.columns)


def _preferences(
    preference: PreferenceLoss,
    logits: Tensor,
    labels: Tensor,
    given: Tensor,
    sources: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The summed loss of the samples of a micro-batch, and without gradients the sums of each
    source, [sources or 1, columns]. `sources` are those of every row."""
    found = preference(logits, labels, given)
    own = torch.cat(
        [found.losses.detach()[:, None], found.is_sample.float()[:, None], found.measures], 1
    )
    if sources is None:
        return found.losses.sum(), own.sum(0, keepdim=True)
    of_samples = sources[:: preference.sequences]
    sums = torch.stack([by_source(column, of_samples) for column in own.T], 1)
    return found.losses.sum(), sums


@dataclass(frozen=True)
class PipelinedModel:
    """Each rank computes its stages; the last one has the loss."""

    pipeline: Pipeline
    loss: Loss
    counts: bool
    preference: PreferenceLoss | None = None

    @property
    def has_loss(self) -> bool:
        return self.pipeline.is_last

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        together = _concatenated(rows)
        losses = _Losses(self.loss, together, scale, self.preference)
        with named_range(ranges.PIPELINE):
            total = self.pipeline.train(
                together.input_ids, losses.targets, losses, together.arguments
            )
        sums = total / scale if losses.sums is None else losses.sums
        return sums * float(self.counts)

    def evaluate(self, rows: MicroBatch) -> Tensor:
        losses = _Losses(self.loss, rows, 1.0, self.preference)
        total = self.pipeline.evaluate(rows.input_ids, losses.targets, losses, rows.arguments)
        return (total if losses.sums is None else losses.sums) * float(self.counts)

    def score(self, rows: MicroBatch) -> Tensor:
        assert self.preference is not None
        log_probabilities = self.preference.log_probabilities
        scores = torch.zeros(len(rows.input_ids), device=rows.input_ids.device)

        def keep(logits: Tensor, labels: Tensor) -> Tensor:
            scores.copy_(log_probabilities(logits, labels)[0])
            return scores.sum()

        self.pipeline.evaluate(rows.input_ids, rows.labels, keep, rows.arguments)
        return scores


class _Losses:
    """The loss of the micro-batches of one pass, as a pipeline calls it.

    The schedule splits the labels into micro-batches. What goes with the labels of a row is in
    further columns in front of them: in a mixture its sources, then what is given to a loss on
    preferences.
    """

    def __init__(
        self,
        loss: Loss,
        rows: MicroBatch,
        scale: float | Tensor,
        preference: PreferenceLoss | None,
    ) -> None:
        self._loss, self._scale, self._preference = loss, scale, preference
        self._sources = 0 if rows.sources is None else rows.sources.shape[1]
        self._given = 0 if preference is None or rows.given is None else rows.given.shape[1]
        columns = [rows.labels]
        if rows.given is not None:
            columns.insert(0, as_integers(rows.given))
        if rows.sources is not None:
            columns.insert(0, rows.sources.to(rows.labels.dtype))
        self.targets = torch.cat(columns, 1) if len(columns) > 1 else rows.labels
        self.sums: Tensor | None = None
        """Those that `Compute.train` returns, of the micro-batches so far; zeros where the last
        stage is on another rank. None where there is one sum alone."""
        shape = _shape_of_sums(rows, preference)
        if shape:
            self.sums = torch.zeros(shape, device=rows.labels.device)

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        widths = (self._sources, self._given, targets.shape[1] - self._sources - self._given)
        of_sources, given, labels = targets.split(widths, 1)
        sources = of_sources.bool() if self._sources else None
        if self._preference is None:
            objective, sums = objective_of(self._loss, output, labels, sources, self._scale)
        else:
            loss, sums = _preferences(
                self._preference, output, labels, from_integers(given), sources
            )
            objective = loss * self._scale
        if self.sums is not None:
            self.sums += sums
        return objective


def _concatenated(rows: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches of one shape as one batch."""
    first = rows[0].arguments
    by_row = first.keys() & set(BY_ROW)
    joined = {key: torch.cat([batch.arguments[key] for batch in rows]) for key in by_row}
    ids, labels = ([getattr(b, name) for b in rows] for name in ("input_ids", "labels"))
    sources = [batch.sources for batch in rows if batch.sources is not None]
    given = [batch.given for batch in rows if batch.given is not None]
    return MicroBatch(
        torch.cat(ids), torch.cat(labels), first | joined,
        sources=torch.cat(sources) if sources else None,
        given=torch.cat(given) if given else None,
    )  # fmt: skip
