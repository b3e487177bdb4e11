"""A micro-batch in copies that take turns: while one communicates, another computes.

Owns how rows are dealt to copies, and the streams they run on. The rows of a micro-batch are cut
into equally many; each layer is called once, with all copies, and runs them one after the other:

    copy 0   attention | add up | MLP      | add up |
    copy 1             | attention| add up | MLP    | add up |

On CUDA each copy has a stream of its own, in the backward pass too. The streams meet at the ends of
each layer, because FSDP frees the weights there: what the last copy says at the end of a layer is
not hidden. On the CPU the copies simply run in turn, for the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launcher.parallel.pieces import Function
from models.attention import AttentionMask, StepContext
from models.decoder import Decoder


def interleave(model: Decoder, copies: int) -> None:
    """Let each forward pass of `model` run as `copies` copies of equally many rows.

    Rows that do not divide, and generation, run as before.
    """
    streams = _Streams(copies)
    for layer in model.model.layers.values():
        layer.forward = partial(_each, layer.forward, streams)
    model.run_layers = partial(_run_layers, model, copies)  # type: ignore[method-assign]


def _run_layers(model: Decoder, copies: int, states: Tensor, context: StepContext) -> Tensor:
    """As `Decoder.run_layers`."""
    if states.shape[0] % copies or context.cache is not None:
        copies = 1
    pieces: Sequence[Tensor] = states.chunk(copies)
    contexts = cut(context, states.shape[0], copies)
    for layer in model.model.layers.values():
        pieces = layer(pieces, contexts)
    return pieces[0] if copies == 1 else torch.cat(tuple(pieces))


def cut(context: StepContext, rows: int, copies: int) -> list[StepContext]:
    """The context of each copy of equally many of the `rows`."""
    if copies == 1:
        return [context]
    mask, size = context.mask, rows // copies
    cos, sin, seeds, documents, shown = (
        _by_row(tensor, size, copies)
        for tensor in (context.cos, context.sin, context.dropout_seeds, mask.document_ids,
                       mask.key_mask)
    )  # fmt: skip
    # A sight of its own for each copy, though they may be equal: masks are made on its stream.
    masks = [
        AttentionMask(
            length=mask.length,
            total=mask.total,
            device=mask.token_indices.device,
            token_indices=None if mask.in_order else mask.token_indices,
            document_ids=documents[i],
            key_mask=shown[i],
        )
        for i in range(copies)
    ]
    return [
        replace(context, cos=cos[i], sin=sin[i], mask=masks[i], dropout_seeds=seeds[i])
        for i in range(copies)
    ]


def _by_row(tensor: Tensor | None, size: int, copies: int) -> Sequence[Any]:
    """The rows of each copy; all of it where it is the same for all rows."""
    if tensor is None or tensor.shape[0] == 1:
        return [tensor] * copies
    return tensor.split(size)


class _Streams:
    """The streams of the copies, made when they are first needed."""

    def __init__(self, copies: int) -> None:
        self._copies = copies
        self._made: list[torch.cuda.Stream] | None = None

    def of(self, device: torch.device) -> list[torch.cuda.Stream]:
        """One for each copy; none where the device has no streams."""
        if device.type != "cuda":
            return []
        if self._made is None:
            self._made = [torch.cuda.Stream(device) for _ in range(self._copies)]
        return self._made


def _each(
    forward: Function, streams: _Streams, pieces: Sequence[Tensor], contexts: Sequence[StepContext]
) -> tuple[Tensor, ...]:
    """`forward` of a layer for each copy. `pieces` must be the layer's first argument, as they are:
    FSDP learns from them when the last copy is through in the backward pass."""
    own = streams.of(pieces[0].device)
    if not own or len(pieces) == 1:
        return tuple(forward(*copy) for copy in zip(pieces, contexts, strict=True))
    main = torch.cuda.current_stream()
    outputs = []
    for stream, states, context in zip(own, _Meet.apply(main, own, *pieces), contexts, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for tensor in (states, *_tensors(context)):
                tensor.record_stream(stream)
            outputs.append(forward(states, context))
    for stream, output in zip(own, outputs, strict=True):
        main.wait_stream(stream)
        output.record_stream(main)
    return tuple(outputs)


def _tensors(context: StepContext) -> list[Tensor]:
    held = {**vars(context.mask), **vars(context)}
    return [value for value in held.values() if isinstance(value, Tensor) and value.is_cuda]


class _Meet(torch.autograd.Function):
    """The states of all copies as they are; backward waits until all copies are through, so that
    FSDP, which comes next, finds the gradients of all."""

    @staticmethod
    def forward(ctx: Any, main: Any, streams: Any, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.main, ctx.streams = main, streams
        return tuple(piece.view_as(piece) for piece in pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        for stream in ctx.streams:
            ctx.main.wait_stream(stream)
        return None, None, *gradients
