"""The loss: summed over tokens here, divided by the tokens of the global batch elsewhere.

A sum, not a mean: every target token then has the same weight, whatever the padding, gradient
accumulation or number of ranks.

Logits are the largest tensor of a step. They are read once, in pieces, and the gradient is computed
on the way, without a float32 copy or a second tensor of log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from launcher.parallel.vocabulary import CHUNK_ELEMENTS, IGNORED_LABEL, gradient_dtype, scale_rows


class Loss(Protocol):
    """From the output of a model (logits; for `HeadLoss` the input of its head) and labels to the
    sum over the target tokens."""

    def __call__(
        self, output: torch.Tensor, labels: torch.Tensor, /, *, by_row: bool = False
    ) -> torch.Tensor:
        """A float32 scalar; with `by_row` the sum of each row, float32 [batch]."""


def token_loss_sum(
    logits: torch.Tensor, labels: torch.Tensor, *, by_row: bool = False
) -> torch.Tensor:
    """Cross entropy in nats, summed over the labels that are not -100. A float32 scalar; with
    `by_row` the sum of each row, float32 [batch].

    logits: [batch, sequence, vocabulary], any floating dtype; labels: [batch, sequence] int64,
    already shifted (`labels[b, t]` is the token after position t).
    """
    total: torch.Tensor = _SummedCrossEntropy.apply(
        logits.flatten(0, 1), labels.flatten(), len(labels) if by_row else None
    )
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward computes loss and gradient piece by piece; backward only scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, batch: int | None
    ) -> torch.Tensor:
        """`batch`: rows whose sums are returned; None: the sum of all."""
        wanted = ctx.needs_input_grad[0]
        # One number to add to, or one for each token.
        shape = () if batch is None else labels.shape
        losses = torch.zeros(shape, dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits, dtype=gradient_dtype(logits)) if wanted else None
        rows = max(CHUNK_ELEMENTS.get(logits.device.type, 1 << 27) // logits.shape[1], 1)
        for begin in range(0, len(logits), rows):
            piece = logits[begin : begin + rows].detach().to(gradient_dtype(logits))
            piece.requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = F.cross_entropy(
                    piece.float(),
                    labels[begin : begin + rows],
                    reduction="sum" if batch is None else "none",
                    ignore_index=IGNORED_LABEL,
                )
                total = loss if batch is None else loss.sum()
            (losses if batch is None else losses[begin : begin + rows]).add_(loss.detach())
            if gradient is not None:
                (gradient[begin : begin + rows],) = torch.autograd.grad(total, piece)
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        return losses if batch is None else losses.view(batch, -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return scale_rows(gradient, scale).to(ctx.dtype), None, None


def compiled_token_loss_sum(compile_function: Callable[[Any], Any]) -> Loss:
    """`token_loss_sum` in kernels made by a backend of `torch.compile`: loss and gradient in one
    reading of the logits each, without float32 tensors between them. A second number of tokens
    compiles once more, for any number. `compile_function`: `torch.compile` with its arguments."""
    function = compile_function(losses_and_gradient)

    def loss(
        logits: torch.Tensor, labels: torch.Tensor, /, *, by_row: bool = False
    ) -> torch.Tensor:
        losses: torch.Tensor = _CompiledCrossEntropy.apply(
            function, logits.flatten(0, 1), labels.flatten()
        )
        return losses.view(len(labels), -1).sum(1) if by_row else losses.sum()

    return loss


def losses_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of each token, float32 [tokens], and its gradient for `logits` [tokens, vocabulary]
    in the dtype of `gradient_dtype`."""
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)
    powers = (wide - largest).exp()
    sums = powers.sum(-1, keepdim=True)
    counts = (labels != IGNORED_LABEL)[:, None]
    targets = torch.where(counts, labels[:, None], 0)
    picked = wide.gather(1, targets) - largest
    losses = torch.where(counts, sums.log() - picked, 0.0)[:, 0]
    if not wants_gradient:
        return losses, None
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets
    gradient = torch.where(counts, powers / sums - is_target.float(), 0.0)
    return losses, gradient.to(gradient_dtype(logits))


class _CompiledCrossEntropy(torch.autograd.Function):
    """The loss of each token. Forward also computes the gradient; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, function: Any, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        losses, ctx.gradient = function(logits.detach(), labels, ctx.needs_input_grad[1])
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return None, scale_rows(gradient, scales).to(ctx.dtype), None
