"""The key/value cache: growth, views, padding, rows that leave; and the decoding step over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import attend, attend_last
from models.cache import BLOCK, KVCache
from models.decoder import Decoder
from tests.models.tiny import EXPERTS, GLM, dense_spec, pair, tokens

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig"},
    "window": {"type": "MistralConfig", "sliding_window": 6},
    "partly rotated pairs": GLM["glm"],
    "sinks": EXPERTS["gpt_oss"],
    "latent": EXPERTS["deepseek_v3"],
}  # fmt: skip
LENGTHS = [9, 2, 12]


def decoder(name: str) -> Decoder:
    return pair(dense_spec(**FAMILIES[name]))[0].eval()


def step_by_step(model: Decoder, ids: Tensor, cache: KVCache, prompt: int) -> list[Tensor]:
    """The scores behind a prompt and behind each later token, [rows, vocabulary] each."""
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    return [model(piece, cache=cache, last_only=True)[:, -1] for piece in pieces]


def padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids [rows, longest] padded on the left, padding [rows])."""
    longest = max(map(len, texts))
    padding = torch.tensor([longest - len(text) for text in texts])
    rows = [torch.cat((text.new_zeros(longest - len(text)), text)) for text in texts]
    return torch.stack(rows), padding


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_steps_over_padded_rows_equal_each_text_alone(name: str) -> None:
    model = decoder(name)
    texts = [tokens(1, length + 10, seed=length)[0] for length in LENGTHS]
    ids, padding = padded(texts)
    found = step_by_step(model, ids, KVCache(4, padding=padding), max(LENGTHS))
    for row, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        for step, scores in enumerate(found):
            alone = model(text[None, : length + step], last_only=True)[0, -1]
            torch.testing.assert_close(scores[row], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["window", "sinks", "latent"])
@torch.inference_mode()
def test_rows_that_leave_do_not_change_the_others(name: str) -> None:
    model = decoder(name)
    texts = [tokens(1, length + 10, seed=length)[0] for length in LENGTHS]
    ids, padding = padded(texts)
    longest = max(LENGTHS)
    full = step_by_step(model, ids, KVCache(padding=padding), longest)
    for kept in ([1, 0], [1]):
        cache = KVCache(padding=padding)
        step_by_step(model, ids[:, : longest + 4], cache, longest)
        before = cache.length
        cache.keep(torch.tensor(kept))
        assert before - cache.length == longest - max(LENGTHS[row] for row in kept)
        rest = step_by_step(model, ids[kept][:, longest + 4 :], cache, 1)
        for scores, expected in zip(rest, full[5:], strict=True):
            torch.testing.assert_close(scores, expected[kept], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_truncated_cache_continues_the_same_beginning() -> None:
    model = decoder("window")
    ids = tokens(1, 24)
    cache = KVCache(4)
    step_by_step(model, ids, cache, 12)
    cache.truncate(15)
    other = torch.cat((ids[:, :15], tokens(1, 9, seed=7)), dim=1)
    found = model(other[:, 15:], cache=cache, last_only=True)
    torch.testing.assert_close(found, model(other, last_only=True), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="24 tokens, not 25"):
        cache.truncate(25)


def test_growth_is_by_blocks_without_unused_memory() -> None:
    limit = 40 * BLOCK + 5
    cache = KVCache(5, limit=limit)
    grown, pointer = 0, 0
    for length in range(1, limit + 1):
        keys, _ = cache.append(0, torch.full((1, 2, 1, 4), length), torch.zeros(1, 2, 1, 6))
        cache.advance(1)
        assert cache.length <= cache.capacity <= min(limit, max(5, length * 5 // 4 + BLOCK))
        if keys.data_ptr() != pointer:
            grown, pointer = grown + 1, keys.data_ptr()
    assert grown < 20  # not one a block: copies are linear in the length
    assert torch.equal(keys[0, 1, :, 3], torch.arange(1, limit + 1))


@torch.inference_mode()
def test_steps_within_a_block_use_the_same_memory() -> None:
    """Nothing that belongs to a generation is made again in a step."""
    model = decoder("window")
    ids, padding = padded([tokens(1, 30, seed=1)[0], tokens(1, 25, seed=2)[0]])
    cache = KVCache(64, limit=64, padding=padding)
    step_by_step(model, ids[:, :12], cache, 10)

    def pointers() -> list[int]:
        held = [t for layer in cache._layers.values() for t in layer]
        shared = [cache._positions, cache._bias, *(cache._rotary or ())]
        return [t.data_ptr() for t in (*held, *shared) if t is not None]

    before = pointers()
    assert len(before) == 2 * 3 + 4
    step_by_step(model, ids[:, 12:], cache, 1)
    assert pointers() == before


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("value_size", [16, 8])
@pytest.mark.parametrize("sinks", [False, True])
def test_one_query_equals_attention_in_general(sinks: bool, value_size: int, padding: bool) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 11, 16)
    value = torch.randn(2, 3, 11, value_size)
    seen = torch.arange(11) >= torch.tensor([[0], [4 if padding else 0]])
    bias = torch.zeros(2, 11).masked_fill(~seen, float("-inf"))[:, None, None] if padding else None
    given = {"scale": 0.3, "sinks": torch.randn(6) if sinks else None}
    expected = attend(query, key, value, seen[:, None, None], **given)
    found = attend_last(query, key, value, bias, **given)
    torch.testing.assert_close(found, expected)
