"""Rows above `MASK_UP_TO` tokens, whose attention is by documents, against transformers, which gets
one document at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention import MASK_UP_TO
from models.cache import KVCache
from models.decoder import Decoder
from models.documents import OnHost, document_lengths
from models.spec import ModelSpec
from tests.models.tiny import (
    GLM,
    VOCABULARY,
    dense_spec,
    experts_spec,
    gradients_of,
    pair,
    tokens,
)

LENGTH = 150
ENDS = [[0, 40, 41, 100, LENGTH], [0, LENGTH]]
"""Borders of the documents of each row."""
PADDING = [0, 30]
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama all heads": ("", {"type": "LlamaConfig", "n_kv_heads": 4}),
    "qwen2 window": ("", {"type": "Qwen2Config", **WINDOW}),
    "glm4": ("", {**GLM["glm4"], "pad_token_id": None}),
    "mixtral window": ("mixtral", {"sliding_window": 20}),
    "deepseek": ("deepseek_v3", {}),
    "gpt-oss": ("gpt_oss", {"sliding_window": 7}),
}


def spec_of(name: str) -> ModelSpec:
    experts, config = FAMILIES[name]
    return experts_spec(experts, **config) if experts else dense_spec(**config)


def documents() -> dict[str, Any]:
    """Arguments of `Decoder.forward` that keep the documents apart."""
    sizes = [torch.tensor(ends).diff() for ends in ENDS]
    ids = torch.stack([torch.repeat_interleave(row) for row in sizes])
    positions = [torch.cat([torch.arange(n) for n in row.tolist()]) for row in sizes]
    return {
        "document_ids": ids, "position_ids": torch.stack(positions),
        "document_lengths": OnHost(document_lengths(ids)),
    }  # fmt: skip


def alone(module: nn.Module, input_ids: Tensor) -> Tensor:
    """The logits of each document as a batch of its own."""
    rows = [
        torch.cat([
            module(input_ids=ids[None, start:stop], use_cache=False).logits[0]
            for start, stop in pairwise(ends)
        ])
        for ids, ends in zip(input_ids, ENDS, strict=True)
    ]  # fmt: skip
    return torch.stack(rows)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_those_of_transformers(name: str) -> None:
    assert LENGTH > MASK_UP_TO
    own, module = pair(spec_of(name))
    input_ids = tokens(len(ENDS), LENGTH)
    weights = torch.randn(len(ENDS), LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(5))
    logits, expected = own(input_ids, **documents()), alone(module, input_ids)
    assert_close(logits.detach(), expected.detach())
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = gradients_of(module, own)
    for key, parameter in own.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, gradients[key])


@pytest.mark.parametrize("name", ["qwen2 window", "deepseek", "gpt-oss"])
def test_padded_rows_in_parts_are_those_of_transformers(name: str) -> None:
    """A prompt that is read in three parts, the last of one token, beside a shorter one; the mask
    of the same rows."""
    own, module = pair(spec_of(name))
    own.eval()
    module.eval()
    input_ids = tokens(len(PADDING), LENGTH)
    mask = torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]
    padding_of_rows = torch.tensor(PADDING)
    caches = [KVCache(padding=padding_of_rows, padding_counts=counts) for counts in (PADDING, None)]
    with torch.no_grad():
        found = [in_parts(own, input_ids, cache) for cache in caches]
        found.append(own(input_ids, attention_mask=mask))
        for row, padding in enumerate(PADDING):
            given = input_ids[row : row + 1, padding:]
            expected = module(input_ids=given, use_cache=False).logits[0]
            for logits in found:
                assert_close(logits[row, padding:], expected)


def in_parts(own: Decoder, input_ids: Tensor, cache: KVCache) -> Tensor:
    parts = input_ids.split([100, LENGTH - 101, 1], 1)
    return torch.cat([own(part, cache=cache) for part in parts], 1)
