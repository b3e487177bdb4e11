"""Flash attention over the documents of rows: the kernels, and their gradients.

Owns how the two kernels of torch are called, and nothing else: on CUDA one call for all documents
of all rows, on a CPU one for each tile. Both return the log-sum-exp of the scores, which their
gradient needs; both have grouped heads, so that no KV head is repeated.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from models.documents import DocumentPlan, Tile
from models.tile_tensors import TileGradients, empty_outputs, tile_slices


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, cumulative: tuple[Tensor, Tensor, int, int],
    window: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [tokens, heads, size] and log-sum-exps [heads, tokens] of one kernel.

    The operator under `torch.nn.attention.varlen.varlen_attn`, which hides the log-sum-exp from its
    gradient, and takes neither a scale nor grouped heads in torch 2.11.
    """
    window_left = -1 if window is None else window - 1
    output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *cumulative, 0.0, window is None, False, scale=scale,
        window_size_left=window_left, window_size_right=0,
    )  # fmt: skip
    return output, logsumexp


def flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    cumulative: tuple[Tensor, Tensor, int, int], window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `flash_forward`; deterministic where torch's strict mode is on."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    window_left = -1 if window is None else window - 1
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, logsumexp, *cumulative, 0.0, window is None,
        no_dropout, query.new_empty(0), scale=scale, window_size_left=window_left,
        window_size_right=0,
    )  # fmt: skip
    return gradients


def cumulative_on(plan: DocumentPlan, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cumulative numbers of queries and keys, int32 on `device`, and the largest of a document.
    Copied once a step and stream: all layers have the same plan."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _cumulative(plan, device, stream)


@lru_cache(maxsize=16)
def _cumulative(
    plan: DocumentPlan, device: torch.device, stream: int
) -> tuple[Tensor, Tensor, int, int]:
    queries, keys, longest_query, longest_key = plan.cumulative()
    both = torch.tensor([queries, keys], dtype=torch.int32)
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)
    # One query of each document would be computed by another layout of the kernel.
    return both[0], both[1], max(longest_query, 2), longest_key


def _tokens(states: Tensor) -> Tensor:
    """[rows, heads, length, size] -> [rows * length, heads, size]"""
    return states.transpose(1, 2).flatten(0, 1)


def _heads(states: Tensor, rows: int) -> Tensor:
    return states.unflatten(0, (rows, -1)).transpose(1, 2)


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, plan: DocumentPlan, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    cumulative = cumulative_on(plan, query.device)
    output, logsumexp = flash_forward(
        _tokens(query), _tokens(key), _tokens(value), cumulative, window, scale
    )
    return _heads(output, plan.rows), logsumexp.unflatten(1, (plan.rows, -1)).transpose(0, 1)


def varlen_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    plan: DocumentPlan, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    cumulative = cumulative_on(plan, query.device)
    of_heads = logsumexp.transpose(0, 1).flatten(1)
    gradients = flash_backward(
        _tokens(gradient), _tokens(query), _tokens(key), _tokens(value), _tokens(output), of_heads,
        cumulative, window, scale,
    )  # fmt: skip
    grad_query, grad_key, grad_value = (_heads(g, plan.rows) for g in gradients)
    return grad_query, grad_key, grad_value


class _Masks:
    """The masks of tiles as kernels of the CPU take them: added to the scores. Those of equal form
    are one tensor."""

    def __init__(self, like: Tensor, window: int | None) -> None:
        self._like, self._window = like, window
        self._found: dict[tuple[int, int], Tensor] = {}

    def of(self, tile: Tile) -> Tensor | None:
        """[queries, keys]; None: the kernel's own causal mask is enough."""
        if tile.is_causal:
            return None
        form = len(tile.queries), len(tile.keys)
        if form not in self._found:
            allowed = tile.mask(self._window, self._like.device)
            zeros = self._like.new_zeros(form)
            self._found[form] = zeros.masked_fill_(~allowed, float("-inf"))
        return self._found[form]


def cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, plan: DocumentPlan, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    output, logsumexp = empty_outputs(query, value)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    masks = _Masks(query, window)
    for tile in plan.tiles(window):
        queries, keys = tile_slices(tile, plan)
        outputs, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[queries], key[keys], value[keys], 0.0, tile.is_causal,
            attn_mask=masks.of(tile), scale=scale,
        )  # fmt: skip
        output[queries], logsumexp[queries] = outputs, sums
    return output, logsumexp


def cpu_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    plan: DocumentPlan, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tiles = list(plan.tiles(window))
    sums = TileGradients(query, key, value, all(tile.is_causal for tile in tiles))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    masks = _Masks(query, window)
    for tile in tiles:
        queries, keys = tile_slices(tile, plan)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient[queries], query[queries], key[keys], value[keys], output[queries],
            logsumexp[queries].contiguous(), 0.0, tile.is_causal,
            attn_mask=masks.of(tile), scale=scale,
        )  # fmt: skip
        sums.add(queries, keys, *found)
    return sums.of_operands()
