"""Attention over packed rows, windows and padding, without a tensor of queries times keys.

Owns three operators of torch, which are opaque to a compiler (the documents of a batch are data, so
they must not be part of a graph), and the choice of the kernel in them:

    CUDA, bfloat16 or float16       one call of flash attention for all documents of all rows
                                    (`varlen`); windows are those of the kernel
    CPU                             flash attention of the CPU, a call for each tile
    else, e.g. float32 on CUDA      matrix products and a softmax for each tile
    attention dropout, any device   the same, with dropout of the probabilities

A tile (`models.documents`) is a document, or a block of queries of one: with the keys that they
attend to. Where scores are in memory they are those of one tile, and are computed again in the
backward pass. That is hardly slower in float32, which flash attention does not have: the products
take the time.

Invariants: memory is linear in the length of a row; KV heads are not repeated; tiles are added in a
fixed order; the backward pass is deterministic, that of flash attention on CUDA where
`torch.use_deterministic_algorithms(True)` is set without `warn_only`, which it asks for itself.

A sink (one more score of each query, of a zero value) changes the sum of the softmax alone: outputs
are scaled by exp(l - l'), where l is the log-sum-exp of the scores and l' that with the sink. The
backward pass of a kernel is right with these outputs and l', and the gradient of the sink is minus
the sum of its probability times (gradient * output).

Values of another size than keys (MLA) are padded with zeros to the size of keys, and cut again: the
kernels need them equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.documents import document_plan
from models.flash_attention import cpu_backward, cpu_forward, varlen_backward, varlen_forward
from models.operator_flops import register_attention
from models.scores_attention import attend_tiles
from models.tile_tensors import empty_by_token, empty_outputs

VARLEN = "varlen"
FLASH_SIZES = (8, 256)
"""Flash attention on CUDA takes heads of a multiple of the first, up to the second."""


def kernel_of(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """`varlen`, `cpu` or `tiles`: how queries of heads of this size are computed."""
    if device.type == "cpu":
        return "cpu"
    fits = dtype in (torch.bfloat16, torch.float16) and size <= FLASH_SIZES[1]
    return VARLEN if device.type == "cuda" and fits and _has_varlen(device) else "tiles"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_varlen(device: torch.device) -> bool:
    """Whether torch has flash attention of variable lengths, with windows, for this GPU. Tensors of
    CUDA without a GPU are fake, and take the path of a current one."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    if torch.version.hip is not None or not {a.name for a in schema.arguments} >= _TAKEN:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


_TAKEN = {"cum_seq_q", "cum_seq_k", "scale", "window_size_left", "window_size_right"}
"""Arguments of the operator of torch that are used here."""


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within documents: outputs [rows, heads, queries, value size].

    `query` [rows, heads, queries, size] are the last tokens of rows, `key` and `value` [rows, KV
    heads, total, ...] all of them. `lengths`: of the documents, as `models.documents` has them
    (int32 on the CPU; of one row for all). `window`: a query attends to that many tokens, itself
    one of them. `scale` multiplies the scores; None is 1 / sqrt(size). `sinks` [heads]: one more
    score in every softmax, of a zero value.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width, size = value.shape[-1], max(query.shape[-1], value.shape[-1])
    kernel = kernel_of(query.device, query.dtype, size)
    if kernel == "tiles":
        output: Tensor = attend_tiles(
            query, key, value, lengths, None, sinks, window, scale, torch.float32, 0.0, 0
        )
        return output
    if kernel == VARLEN:
        size += -size % FLASH_SIZES[0]
    query, key, value = (_padded(states, size) for states in (query, key, value))
    output, _ = _attend(query, key, value, lengths, window, scale, sinks)
    return output if width == size else output[..., :width]


def attend_documents_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    window: int | None,
    scale: float | None,
    dtype: torch.dtype,
    probability: float,
    seeds: Tensor,
    first_head: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend_documents`, with softmax in `dtype` and dropout of the probabilities.

    `seeds` [rows] as in `models.dropout`. The line of a query there is (`first_head` + its head) *
    total + its token, the column of a key its token: the pattern is that of the full rows.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = attend_tiles(
        query, key, value, lengths, seeds, sinks, window, scale, dtype, probability, first_head
    )
    return output


def _padded(states: Tensor, size: int) -> Tensor:
    missing = size - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states


def _is_varlen(query: Tensor) -> bool:
    return kernel_of(query.device, query.dtype, query.shape[-1]) == VARLEN


@torch.library.custom_op("slipway::attend_documents", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, window: int | None, scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and log-sum-exps, sinks included in both."""
    plan = document_plan(lengths, query.shape[0], query.shape[2])
    forward = varlen_forward if _is_varlen(query) else cpu_forward
    output, logsumexp = forward(query, key, value, plan, window, scale)
    if sinks is not None:
        with_sinks = torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype)[:, None])
        output *= (logsumexp - with_sinks).exp_().to(output.dtype)[..., None]
        logsumexp.copy_(with_sinks)
    return output, logsumexp


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, window: int | None, scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_outputs(query, value)


@torch.library.custom_op("slipway::attend_documents_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    lengths: Tensor, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values."""
    plan = document_plan(lengths, query.shape[0], query.shape[2])
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    backward = varlen_backward if _is_varlen(query) else cpu_backward
    return backward(gradient, query, key, value, output, logsumexp, plan, window, scale)


@_attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    lengths: Tensor, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_by_token(query), empty_by_token(key), empty_by_token(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, lengths, ctx.window, ctx.scale, sinks = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, lengths, sinks, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, lengths, sinks, output, logsumexp = ctx.saved_tensors
    grad_query, grad_key, grad_value = _attend_backward(
        gradient, query, key, value, output, logsumexp, lengths, ctx.window, ctx.scale
    )
    grad_sinks = None
    if sinks is not None:
        wide = logsumexp.dtype
        mean = (gradient.to(wide) * output.to(wide)).sum(-1)
        probability = (sinks.to(wide)[:, None] - logsumexp).exp()
        grad_sinks = -(probability * mean).sum((0, 2)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, None, None, None, grad_sinks


_attend.register_autograd(_backward, setup_context=_save)
register_attention(torch.ops.slipway.attend_documents, torch.ops.slipway.attend_documents_backward)
