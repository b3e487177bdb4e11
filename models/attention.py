"""Attention and what it needs: masks, the key/value cache, and dropout that belongs to a sample.

Owns who may look at whom, and how scores become outputs. Plain causal attention builds no mask at
all; anything else is one boolean mask a forward and window size, shared by the layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of every layer so far, in tensors that are allocated ahead and doubled when
    full."""

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep `key` and `value` [rows, heads, new, head_dim] and give all of the layer's, old and
        new."""
        end = self.length + key.shape[2]
        if layer not in self._layers or end > self._layers[layer][0].shape[2]:
            self._grow(layer, key, end)
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` more positions as kept: called once a forward, after the last layer."""
        self.length += count

    def _grow(self, layer: int, like: Tensor, needed: int) -> None:
        while self.capacity < needed:
            self.capacity *= 2
        rows, heads, _, head_dim = like.shape
        grown = [like.new_empty(rows, heads, self.capacity, head_dim) for _ in range(2)]
        if layer in self._layers:
            for new, old in zip(grown, self._layers[layer], strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self._layers[layer] = (grown[0], grown[1])


@dataclass(kw_only=True)
class StepContext:
    """What all layers of one forward share. Not a pytree on purpose: wrappers that cast a module's
    floating-point inputs (FSDP mixed precision) leave the tables of the rotation alone."""

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    """By window size; None where causal order is all there is."""
    dropout_seeds: Tensor | None = None
    """One seed a row [rows], or None: no dropout."""
    cache: KVCache | None = None


def attention_masks(
    windows: Iterable[int | None],
    *,
    queries: int,
    past: int,
    device: torch.device,
    document_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    always: bool = False,
) -> dict[int | None, Tensor | None]:
    """One mask [rows or 1, 1, queries, past + queries] a window size, True where a query may look.

    `document_ids` [rows, queries]: only inside the same document. `key_mask` [rows, past +
    queries]: False for padding. None where SDPA's own causal rule is enough, unless `always`.
    """
    total = past + queries
    masks: dict[int | None, Tensor | None] = {}
    for window in dict.fromkeys(windows):
        narrow = window is not None and total > window
        blocks = document_ids is not None or key_mask is not None or (past > 0 and queries > 1)
        if not (narrow or blocks or always):
            masks[window] = None
            continue
        key_index = torch.arange(total, device=device)
        query_index = key_index[past:, None]
        allowed = key_index <= query_index
        if narrow:
            allowed = allowed & (key_index > query_index - window)
        allowed = allowed[None, None]
        if document_ids is not None:
            allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
        if key_mask is not None:
            # A padding query would have nobody to look at: it looks at itself.
            allowed = allowed & key_mask[:, None, None, :] | (key_index == query_index)
        masks[window] = allowed
    return masks


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention [rows, heads, queries, head_dim] by the device's kernel.

    Without a mask: causal when there is more than one query. Key/value heads are shared inside the
    kernel without a mask, and repeated with one (kernels fall back to the slowest path otherwise).
    """
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=groups > 1,
    )


def attend_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    dtype: torch.dtype,
    probability: float,
    seeds: Tensor,
) -> Tensor:
    """As `attend`, with the scores in the open: softmax in `dtype`, then dropout on its result."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    return torch.matmul(dropout(shares, probability, seeds), value)


def dropout(states: Tensor, probability: float, seeds: Tensor) -> Tensor:
    """Dropout whose pattern in row i is a function of `seeds[i]` and the element's place in the row
    alone.

    So it does not matter which rows share a batch, which rank has them, or on which device; nothing
    is drawn from a generator, so recomputing a layer gives the same pattern. `seeds` [rows]: 32-bit
    numbers in int64.
    """
    rows, width = states.shape[0], states.shape[-1]
    lines = states[0].numel() // width
    line_keys = _mix(seeds[:, None] ^ _mix(torch.arange(1, lines + 1, device=states.device)))
    columns = _mix(torch.arange(1, width + 1, device=states.device) + (1 << 24))
    bits = _mix(line_keys[:, :, None] ^ columns).view(rows, *states.shape[1:])
    kept = bits >= int(probability * 2**32)
    return states * kept * (1.0 / (1.0 - probability))


def dropout_seeds(sample_seeds: Tensor, layer: int, site: int) -> Tensor:
    """One 32-bit seed a sample for one place of one layer. `sample_seeds` [rows] int64, any."""
    low, high = sample_seeds & 0xFFFFFFFF, (sample_seeds >> 32) & 0xFFFFFFFF
    place = (layer * 4 + site + 1) * 0x9E3779B1 & 0xFFFFFFFF
    return _mix(_mix(_mix(low) ^ high) ^ place)


def _mix(numbers: Tensor) -> Tensor:
    """A bijective mixer of 32-bit numbers held in int64: shift, multiply, twice. No product
    overflows int64."""
    mixed = numbers ^ (numbers >> 15)
    mixed = (mixed * 0x2C1B3C6D).bitwise_and_(0xFFFFFFFF)
    mixed ^= mixed >> 12
    mixed = mixed.mul_(0x297A2D39).bitwise_and_(0xFFFFFFFF)
    mixed ^= mixed >> 15
    return mixed
