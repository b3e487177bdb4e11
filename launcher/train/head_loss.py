"""The head and the cross entropy together, a chunk of tokens at a time.

Owns the computation from the last hidden states to the summed loss in which the logits of all
tokens never exist at once. For T tokens, hidden size H, vocabulary V (of this rank) and chunks of C
tokens, memory beside states and weights is

    logits at once     2 T V           logits, and their gradient
    in chunks          2 C V + V H     the same of a chunk, and the gradient of the head's weight

The gradient of the weight is a sum over chunks. It is accumulated in float32 where the head
computes in a shorter dtype, in the order of the tokens, and rounded once; V H then counts float32.
The gradient of the states has no sum over chunks.

Invariants: a batch of one chunk is computed as without chunks, bit by bit; nothing waits for the
device; a backward pass may run more than once, as schedules that split it do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from launcher.train.loss import Loss
from models.layers import Linear, TiedHead
from models.products import linear

CHUNK_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Logits of a chunk by default. On a GPU half a gigabyte in bfloat16: enough rows for products at
full speed, for which the accumulated gradient of the weight is read and written once a chunk."""


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk by default, a power of two."""
    tokens = CHUNK_LOGITS.get(device.type, 1 << 28) // vocabulary
    return max(1 << max(tokens, 1).bit_length() - 1, 64)


def saves_memory(
    tokens: int, chunk: int, hidden: int, dtype: torch.dtype, *, trained: bool
) -> bool:
    """Whether chunks need less memory than the logits of `tokens` at once. `trained`: whether the
    weight of the head gets a gradient."""
    accumulated = 4 * hidden / (2 * dtype.itemsize) if trained else 0
    return tokens > chunk + accumulated


@dataclass(frozen=True)
class HeadLoss:
    """The loss of the inputs of a head, as a `Loss` of logits would compute it."""

    head: Linear | TiedHead
    token_loss: Loss
    """Of the logits of the columns that `head` computes."""
    chunk_tokens: int

    def __call__(self, states: Tensor, labels: Tensor, *, by_row: bool = False) -> Tensor:
        """As `Loss`, of `states` [batch, sequence, hidden].

        The gradient with `by_row` may differ between rows, so that it is computed in the backward
        pass, which computes the logits again.
        """
        if self._is_one_chunk(labels):
            return self.token_loss(self.head(states), labels, by_row=by_row)
        if not by_row:
            return self.objective(states, labels, 1.0)[0]
        call = self._call()
        losses: Tensor = _LossesRecomputed.apply(
            call, states.flatten(0, 1), labels.flatten(), *call.tensors
        )
        return losses.view(len(labels), -1).sum(1)

    def objective(
        self, states: Tensor, labels: Tensor, scale: float | Tensor, *, by_row: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`scale` times the summed loss, a float32 scalar with gradients, which are computed on the
        way; and without gradients the sum without the scale, or that of each row, float32 [batch].

        The scale is known here, and not only in the backward pass, so that gradients in float16 are
        scaled before they are rounded.
        """
        if self._is_one_chunk(labels):
            sums = self.token_loss(self.head(states), labels, by_row=by_row)
            return (sums.sum() if by_row else sums) * scale, sums.detach()
        call = self._call()
        total, losses = _SummedLoss.apply(
            call, states.flatten(0, 1), labels.flatten(), scale, *call.tensors
        )
        return total, losses.view(len(labels), -1).sum(1) if by_row else losses.sum()

    def _is_one_chunk(self, labels: Tensor) -> bool:
        return labels.numel() <= self.chunk_tokens

    def _call(self) -> _Call:
        head: _Head = _PlainHead(self.head)
        if isinstance(self.head, Linear) and self.head.adapter is not None:
            head = _AdaptedHead(self.head)
        return _Call(head, head.tensors(), self.token_loss, self.chunk_tokens)


class _Head(Protocol):
    """A head whose backward pass is called by hand, chunk by chunk. `tensors` are those that it
    computes with and that may get gradients, in a fixed order."""

    def tensors(self) -> tuple[Tensor, ...]: ...

    def logits(self, states: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """[tokens, hidden] -> [tokens, vocabulary]."""
        ...

    def backward(
        self, states: Tensor, logits: Tensor, gradient: Tensor, tensors: Sequence[Tensor],
        sums: Sequence[Tensor | None],
    ) -> Tensor:  # fmt: skip
        """The gradient of `states` from that of `logits`; those of `tensors` are added to `sums`,
        but for None."""
        ...


class _PlainHead:
    """One product, and a bias."""

    def __init__(self, head: Linear | TiedHead) -> None:
        self.weight = head.held("weight")
        self.bias = head.held("bias") if isinstance(head, Linear) else None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def logits(self, states: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return linear(states, *tensors)

    def backward(
        self, states: Tensor, logits: Tensor, gradient: Tensor, tensors: Sequence[Tensor],
        sums: Sequence[Tensor | None],
    ) -> Tensor:  # fmt: skip
        if sums[0] is not None:
            add_product(sums[0], gradient.t(), states)
        for total in sums[1:]:
            if total is not None:
                total.add_(gradient.sum(0, dtype=total.dtype))
        return gradient @ tensors[0]


class _AdaptedHead:
    """A head with a low-rank adapter without dropout: differentiated by autograd."""

    def __init__(self, head: Linear) -> None:
        self.head = head

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(p for p in self.head.parameters() if p.requires_grad)

    def logits(self, states: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            return self.head(states.requires_grad_())

    def backward(
        self, states: Tensor, logits: Tensor, gradient: Tensor, tensors: Sequence[Tensor],
        sums: Sequence[Tensor | None],
    ) -> Tensor:  # fmt: skip
        own, *others = torch.autograd.grad(
            logits, [states, *tensors], gradient, allow_unused=True
        )  # an adapter that is switched off is not used
        for total, other in zip(sums, others, strict=True):
            if total is not None and other is not None:
                total.add_(other)
        return own


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to `total`, whose dtype may be wider than theirs: without
    rounding the product first where the device has such a kernel."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


class _Call(NamedTuple):
    """What the chunks of one call have in common."""

    head: _Head
    tensors: tuple[Tensor, ...]
    token_loss: Loss
    chunk_tokens: int

    def losses(self, states: Tensor, labels: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The loss of each token, float32 [tokens], without gradients."""
        found = [
            _of_each_token(self.token_loss, self.head.logits(piece, tensors).detach(), targets)
            for piece, targets in self._chunks(states.detach(), labels)
        ]
        return torch.cat(found)

    def gradients(
        self, states: Tensor, labels: Tensor, scales: Tensor, tensors: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
        """The loss of each token, and the gradients of the sum of all, each times its one of
        `scales` [tokens], for `states` and `tensors` where they are `wanted`."""
        states = states.detach()
        of_states = torch.empty_like(states)
        sums = [_zeros(t) if w else None for t, w in zip(tensors, wanted[1:], strict=True)]
        found = []
        for piece, targets, factors, out in self._chunks(states, labels, scales, of_states):
            logits = self.head.logits(piece, tensors)
            leaf = logits.detach().requires_grad_()
            with torch.enable_grad():
                losses = _of_each_token(self.token_loss, leaf, targets)
            (gradient,) = torch.autograd.grad(losses, leaf, factors)
            found.append(losses.detach())
            out.copy_(self.head.backward(piece, logits, gradient, tensors, sums))
        rounded = [None if s is None else s.to(t.dtype) for s, t in zip(sums, tensors, strict=True)]
        return torch.cat(found), [of_states if wanted[0] else None, *rounded]

    def _chunks(self, *of_tokens: Tensor) -> Any:
        return zip(*(tensor.split(self.chunk_tokens) for tensor in of_tokens), strict=True)


def _of_each_token(token_loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, float32 [tokens]: that of rows of one token."""
    return token_loss(logits[:, None], labels[:, None], by_row=True)


def _zeros(tensor: Tensor) -> Tensor:
    """For a sum over chunks, in float32 for shorter dtypes."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros(tensor.shape, dtype=wide, device=tensor.device)


class _SummedLoss(torch.autograd.Function):
    """Forward also computes the gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, states: Tensor, labels: Tensor, scale: float | Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted = [ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]]
        if any(wanted):
            scales = torch.zeros(len(states), device=states.device) + scale
            losses, gradients = call.gradients(states, labels, scales, tensors, wanted)
            ctx.save_for_backward(*gradients)
        else:
            losses = call.losses(states, labels, tensors)
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return losses.sum() * scale, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        # Not in place, and not freed: a split backward pass runs this once for states, once for
        # weights.
        own = [
            None if kept is None or gradient is None else kept * gradient
            for kept in ctx.saved_tensors
        ]
        return None, own[0], None, None, *own[1:]


class _LossesRecomputed(torch.autograd.Function):
    """The loss of each token. Backward computes the logits again, with the factor of each."""

    @staticmethod
    def forward(ctx: Any, call: _Call, states: Tensor, labels: Tensor, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(states, labels, *tensors)
        return call.losses(states, labels, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Any, ...]:
        states, labels, *tensors = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        call = cast(_Call, ctx.call)
        _, gradients = call.gradients(states, labels, factors.contiguous(), tensors, wanted)
        return None, gradients[0], None, *gradients[1:]
