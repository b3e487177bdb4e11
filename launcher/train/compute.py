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
from launcher.parallel.pipeline import BY_ROW, Pipeline
from launcher.parallel.world import repeatable_backward


class Loss(Protocol):
    """From logits and labels to the sum over the target tokens."""

    def __call__(self, logits: Tensor, labels: Tensor, *, by_row: bool = False) -> Tensor:
        """A float32 scalar; with `by_row` the sum of each row, float32 [batch]."""


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
        """The rows of `batch` on the device, with the tokens of this rank alone."""
        tensors = {"position_ids": batch.position_ids, "document_ids": batch.document_ids,
                   "sample_seeds": seeds}  # fmt: skip
        ids, labels = self._moved(batch.input_ids), self._moved(batch.labels)
        arguments = {k: self._moved(v) for k, v in tensors.items() if v is not None}
        if self.token_indices is not None:
            total = ids.shape[1]
            token_indices = self.token_indices(total)
            ids, labels = ids[:, token_indices], labels[:, token_indices]
            if "position_ids" in arguments:
                arguments["position_ids"] = arguments["position_ids"][:, token_indices]
            more |= {"token_indices": token_indices, "total": total}
        sources = None if batch.sources is None else self._moved(batch.sources)
        return MicroBatch(ids, labels, arguments | more, seed, sources)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class Compute(Protocol):
    """Computes losses and gradients."""

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        """Forward and backward of all micro-batches; gradients are those of `scale` times the sum
        of losses. Returns this rank's part of the sum, without the scale: a float32 scalar, or
        the sum of each source, [sources]."""

    def evaluate(self, rows: MicroBatch) -> Tensor:
        """This rank's part of the summed loss of one batch, as from `train`; no gradients."""


def by_source(row_losses: Tensor, sources: Tensor) -> Tensor:
    """The sums of `row_losses` [batch] over the rows of each source of `sources` [batch, sources].

    Not a product, so that a loss that is not finite stays with its source, and not `index_add_`,
    whose order of additions varies on a GPU.
    """
    own = row_losses.detach()[:, None]
    return torch.where(sources, own, own.new_zeros(())).sum(0)


@dataclass(frozen=True)
class FullModel:
    """Every rank computes all layers."""

    parts: ModelParts
    loss: Loss
    counts: bool
    """Whether this rank counts the loss: all tensor-parallel ranks have it, and one counts."""
    own_kernels: bool
    """The model is Slipway's decoder, whose backward pass has deterministic kernels only."""

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        total = torch.zeros(_shape_of_sums(rows[0]), device=rows[0].input_ids.device)
        for index, batch in enumerate(rows):
            self.parts.sync_gradients(index == len(rows) - 1)
            loss, sums = self._loss(batch)
            with repeatable_backward(total.device, strict=self.own_kernels):
                (loss * scale).backward()
            total += sums
        return total * float(self.counts)

    def evaluate(self, rows: MicroBatch) -> Tensor:
        _, sums = self._loss(rows)
        return sums * float(self.counts)

    def _loss(self, rows: MicroBatch) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch, and without gradients what `train` adds up."""
        if rows.seed is not None:
            torch.manual_seed(rows.seed)
        logits = self.parts.modules[0](rows.input_ids, **rows.arguments)
        if rows.sources is None:
            loss = self.loss(logits, rows.labels)
            return loss, loss.detach()
        by_row = self.loss(logits, rows.labels, by_row=True)
        return by_row.sum(), by_source(by_row, rows.sources)


def _shape_of_sums(rows: MicroBatch) -> tuple[int, ...]:
    return () if rows.sources is None else (rows.sources.shape[1],)


@dataclass(frozen=True)
class PipelinedModel:
    """Each rank computes its stages; the last one has the loss."""

    pipeline: Pipeline
    loss: Loss
    counts: bool

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        together = _concatenated(rows)
        losses = _Losses(self.loss, together, scale)
        with repeatable_backward(together.input_ids.device, strict=True):
            total = self.pipeline.train(
                together.input_ids, losses.targets, losses, together.arguments
            )
        sums = total / scale if losses.sums is None else losses.sums
        return sums * float(self.counts)

    def evaluate(self, rows: MicroBatch) -> Tensor:
        losses = _Losses(self.loss, rows, None)
        total = self.pipeline.evaluate(rows.input_ids, losses.targets, losses, rows.arguments)
        return (total if losses.sums is None else losses.sums) * float(self.counts)


class _Losses:
    """The loss of the micro-batches of one pass, as a pipeline calls it.

    The schedule splits the labels into micro-batches. In a mixture the sources of a row go with its
    labels: as further columns in front of them.
    """

    def __init__(self, loss: Loss, rows: MicroBatch, scale: float | Tensor | None) -> None:
        self._loss, self._scale = loss, scale
        self.targets = rows.labels
        self.sums: Tensor | None = None
        """[sources], of the micro-batches so far, without `scale`; zeros where the last stage is on
        another rank. None where the data is no mixture."""
        if rows.sources is not None:
            self.targets = torch.cat([rows.sources.to(rows.labels.dtype), rows.labels], 1)
            self.sums = torch.zeros(rows.sources.shape[1], device=rows.labels.device)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.sums is None:
            loss = self._loss(logits, targets)
        else:
            count = len(self.sums)
            by_row = self._loss(logits, targets[:, count:], by_row=True)
            self.sums += by_source(by_row, targets[:, :count].bool())
            loss = by_row.sum()
        return loss if self._scale is None else loss * self._scale


def _concatenated(rows: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches of one shape as one batch."""
    first = rows[0].arguments
    by_row = first.keys() & set(BY_ROW)
    joined = {key: torch.cat([batch.arguments[key] for batch in rows]) for key in by_row}
    ids, labels = ([getattr(b, name) for b in rows] for name in ("input_ids", "labels"))
    sources = [batch.sources for batch in rows if batch.sources is not None]
    return MicroBatch(
        torch.cat(ids), torch.cat(labels), first | joined,
        sources=torch.cat(sources) if sources else None,
    )  # fmt: skip
