"""A micro-batch in interleaved chunks: while one communicates, another computes.

Owns how rows are split into chunks, and the streams these run on. The rows of a micro-batch are
split into chunks of equal size; each layer is called once, with all chunks, and runs them in turn:

    chunk 0   attention | all-reduce | MLP        | all-reduce |
    chunk 1             | attention  | all-reduce | MLP        | all-reduce |

On CUDA each chunk has its own stream, in the backward pass too: autograd runs the backward of an
operation on the stream of its forward. Both ends of a layer are on the main stream, where FSDP's
hooks run, and where the streams of the chunks are synchronized:

    forward    pre-forward hook: weights      | chunks | post-forward hook: weights are freed
    backward   post-backward hook: gradients  | chunks | pre-backward hook: weights
               `_SyncBackward`                           `_StartBackward`

The communication of the last chunk at the end of a layer is not hidden. On a CPU the chunks run one
after the other, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launcher.parallel.layer_modules import Function
from models.attention import AttentionMask, StepContext
from models.decoder import Decoder


def interleave(model: Decoder, count: int) -> None:
    """Run each forward pass of `model` in `count` interleaved chunks of equally many rows.

    Batches whose rows do not divide, and generation, run as before.
    """
    streams = _Streams(count)
    for layer in model.model.layers.values():
        layer.forward = partial(_interleaved, layer.forward, streams)
    model.run_layers = partial(_run_layers, model, count)  # type: ignore[method-assign]


def _run_layers(model: Decoder, count: int, states: Tensor, context: StepContext) -> Tensor:
    """As `Decoder.run_layers`."""
    if states.shape[0] % count or context.cache is not None:
        count = 1
    chunks: Sequence[Tensor] = states.chunk(count)
    contexts = split_context(context, states.shape[0], count)
    for layer in model.model.layers.values():
        chunks = layer(chunks, contexts)
    return chunks[0] if count == 1 else torch.cat(tuple(chunks))


def split_context(context: StepContext, rows: int, count: int) -> list[StepContext]:
    """The contexts of `count` chunks of equally many of the `rows`."""
    if count == 1:
        return [context]
    mask, size = context.mask, rows // count
    cos, sin, seeds, documents, lengths, key_masks = (
        _by_row(tensor, size, count)
        for tensor in (context.cos, context.sin, context.dropout_seeds, mask.document_ids,
                       mask.lengths, mask.key_mask)
    )  # fmt: skip
    # A mask object for each chunk, though they may be equal: each builds its masks on its stream.
    masks = [
        AttentionMask(
            length=mask.length,
            total=mask.total,
            device=mask.token_indices.device,
            token_indices=None if mask.in_order else mask.token_indices,
            document_ids=documents[i],
            document_lengths=lengths[i],
            key_mask=key_masks[i],
            by_documents=mask.by_documents,
        )
        for i in range(count)
    ]
    return [
        replace(context, cos=cos[i], sin=sin[i], mask=masks[i], dropout_seeds=seeds[i])
        for i in range(count)
    ]


def _by_row(tensor: Tensor | None, size: int, count: int) -> Sequence[Any]:
    """The rows of each chunk; the full tensor where all rows share it."""
    if tensor is None or tensor.shape[0] == 1:
        return [tensor] * count
    return tensor.split(size)


class _Streams:
    """The streams of the chunks, created on first use."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._created: list[torch.cuda.Stream] | None = None

    def of(self, device: torch.device) -> list[torch.cuda.Stream]:
        """One stream a chunk; none where the device has no streams."""
        if device.type != "cuda":
            return []
        if self._created is None:
            self._created = [torch.cuda.Stream(device) for _ in range(self._count)]
        return self._created


def _interleaved(
    forward: Function, streams: _Streams, chunks: Sequence[Tensor], contexts: Sequence[StepContext]
) -> tuple[Tensor, ...]:
    """`forward` of a layer for each chunk. `chunks` must be the layer's first argument, unchanged:
    the hooks of FSDP on them find out when the backward pass of all chunks is complete."""
    side = streams.of(chunks[0].device)
    if not side or len(chunks) == 1:
        return tuple(forward(*chunk) for chunk in zip(chunks, contexts, strict=True))
    main = torch.cuda.current_stream()
    outputs = []
    synced = _SyncBackward.apply(main, side, *chunks)
    for stream, states, context in zip(side, synced, contexts, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for tensor in (states, *_tensors(context)):
                tensor.record_stream(stream)
            outputs.append(forward(states, context))
    for stream, output in zip(side, outputs, strict=True):
        main.wait_stream(stream)
        output.record_stream(main)
    return _StartBackward.apply(*outputs)


def _tensors(context: StepContext) -> list[Tensor]:
    held = {**vars(context.mask), **vars(context)}
    return [value for value in held.values() if isinstance(value, Tensor) and value.is_cuda]


class _SyncBackward(torch.autograd.Function):
    """The states of all chunks, unchanged; the backward pass waits for the streams of all chunks,
    so that FSDP, which comes next, reduces complete gradients."""

    @staticmethod
    def forward(ctx: Any, main: Any, streams: Any, *chunks: Tensor) -> tuple[Tensor, ...]:
        ctx.main, ctx.streams = main, streams
        return tuple(chunk.view_as(chunk) for chunk in chunks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        for stream in ctx.streams:
            ctx.main.wait_stream(stream)
        return None, None, *gradients


class _StartBackward(torch.autograd.Function):
    """The outputs of all chunks, unchanged, called on the main stream.

    The hook by which FSDP gathers the weights for the backward pass runs on the stream of the
    operation that made the output, once, for the first of the outputs. On the stream of a chunk the
    others would not wait for the weights. Here it runs on the main stream, before the gradients of
    any chunk go on, and the streams of all chunks wait for that.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        # Not views, of which FSDP warns: an operation in place on one would lose its hook.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients
