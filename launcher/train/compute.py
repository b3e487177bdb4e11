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

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> sum over the target tokens, a float32 scalar."""


@dataclass(frozen=True)
class MicroBatch:
    """One batch on the device: the input of a model, and its labels."""

    input_ids: Tensor
    labels: Tensor
    arguments: dict[str, Any]
    """Further arguments of `Decoder.forward`."""
    seed: int | None = None
    """For modules of transformers, whose dropout uses torch's global generator."""


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
        return MicroBatch(ids, labels, arguments | more, seed)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class Compute(Protocol):
    """Computes losses and gradients."""

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        """Forward and backward of all micro-batches; gradients are those of `scale` times the sum
        of losses. Returns this rank's part of the sum, without the scale."""

    def evaluate(self, rows: MicroBatch) -> Tensor:
        """This rank's part of the summed loss of one batch; no gradients."""


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
        total = torch.zeros((), device=rows[0].input_ids.device)
        for index, batch in enumerate(rows):
            self.parts.sync_gradients(index == len(rows) - 1)
            loss = self._loss(batch)
            with repeatable_backward(total.device, strict=self.own_kernels):
                (loss * scale).backward()
            total += loss.detach()
        return total * float(self.counts)

    def evaluate(self, rows: MicroBatch) -> Tensor:
        return self._loss(rows) * float(self.counts)

    def _loss(self, rows: MicroBatch) -> Tensor:
        if rows.seed is not None:
            torch.manual_seed(rows.seed)
        logits = self.parts.modules[0](rows.input_ids, **rows.arguments)
        return self.loss(logits, rows.labels)


@dataclass(frozen=True)
class PipelinedModel:
    """Each rank computes its stages; the last one has the loss."""

    pipeline: Pipeline
    loss: Loss
    counts: bool

    def train(self, rows: Sequence[MicroBatch], scale: float | Tensor) -> Tensor:
        together = _concatenated(rows)
        with repeatable_backward(together.input_ids.device, strict=True):
            total = self.pipeline.train(
                together.input_ids,
                together.labels,
                lambda logits, labels: self.loss(logits, labels) * scale,
                together.arguments,
            )
        return total / scale * float(self.counts)

    def evaluate(self, rows: MicroBatch) -> Tensor:
        total = self.pipeline.evaluate(rows.input_ids, rows.labels, self.loss, rows.arguments)
        return total * float(self.counts)


def _concatenated(rows: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches of one shape as one batch."""
    first = rows[0].arguments
    by_row = first.keys() & set(BY_ROW)
    joined = {key: torch.cat([batch.arguments[key] for batch in rows]) for key in by_row}
    ids, labels = ([getattr(b, name) for b in rows] for name in ("input_ids", "labels"))
    return MicroBatch(torch.cat(ids), torch.cat(labels), first | joined)
