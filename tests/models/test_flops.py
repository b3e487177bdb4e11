"""Operations of training: against counts by hand, and against those of torch's own counter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_model, initialize
from models.flops import training_flops
from models.lora_config import LoraConfig, with_adapters
from models.spec import ModelSpec
from tests.models.tiny import SIZES, dense_spec, experts_spec, module_spec

LENGTH = 16
H, W, V, L = 64, 80, 96, 3
"""Hidden size, width of the MLP, vocabulary and layers of `SIZES`, with 4 heads of 16 over 2."""


def flops(spec: ModelSpec, length: int = LENGTH) -> float:
    found = training_flops(build_model(spec, dtype=torch.float32), spec)
    assert found is not None
    return found.per_token(length)


def by_hand(matrices: int, vectors: int, attention: int) -> int:
    """6 N, and 6 (d_qk + d_v) a head and key."""
    return 6 * (matrices + vectors) + 6 * attention * LENGTH


def test_a_dense_model_with_grouped_heads() -> None:
    spec = dense_spec(type="LlamaConfig", tie_word_embeddings=False)
    assert SIZES["hidden_size"] == H
    layer = H * H * 2 + H * 32 * 2 + 3 * H * W
    expected = by_hand(L * layer + V * H, (2 * L + 1) * H, attention=L * 2 * 64)
    assert flops(spec) == expected


def test_it_is_the_formula_of_palm() -> None:
    spec = dense_spec(type="LlamaConfig", n_kv_heads=4, tie_word_embeddings=False)
    parameters = sum(p.numel() for p in build_model(spec, dtype=torch.float32).parameters()) - V * H
    assert flops(spec) == 6 * parameters + 12 * L * H * LENGTH


def test_a_tied_head_counts_and_an_embedding_does_not() -> None:
    tied, untied = (
        flops(dense_spec(type="LlamaConfig", tie_word_embeddings=tied)) for tied in (True, False)
    )
    assert tied == untied


def test_experts_count_as_far_as_a_token_uses_them() -> None:
    spec = experts_spec("qwen3_moe")  # layer 1 is dense; 8 experts of width 32, 3 a token
    attention = H * 96 * 2 + H * 48 * 2
    mixture = H * 8 + 3 * 3 * H * 32
    matrices = L * attention + 2 * mixture + 3 * H * W + V * H
    vectors = (2 * L + 1) * H + L * 2 * 24
    assert flops(spec) == by_hand(matrices, vectors, attention=L * 4 * 2 * 24)


def test_latent_attention_has_its_own_sizes() -> None:
    spec = experts_spec("deepseek_v3")
    attention = H * 40 + 40 * 4 * 40 + H * (32 + 16) + 32 * 4 * (24 + 20) + 4 * 20 * H
    mixture = H * 12 + (3 + 1) * 3 * H * 32
    matrices = L * attention + 2 * mixture + 3 * H * W + V * H
    vectors = (2 * L + 1) * H + L * (40 + 32)
    assert flops(spec) == by_hand(matrices, vectors, attention=L * 4 * (40 + 20))


def test_a_window_bounds_the_keys() -> None:
    spec = dense_spec(type="Qwen2Config", use_sliding_window=True, sliding_window=4,
                      max_window_layers=0)  # fmt: skip
    assert spec.decoder is not None
    assert set(spec.decoder.sliding_window) == {4}
    assert flops(spec, 64) == flops(spec, 8)
    assert flops(spec, 8) - flops(spec, 2) == 6 * L * 2 * 64 * 2


LORA = LoraConfig(rank=2, alpha=4)


@pytest.mark.parametrize(
    ("lora", "frozen", "shares"),
    [
        (None, (), 1.0),
        (LORA, (), 2 / 3),  # no gradients of the base
        (None, ("model.layers.0", "model.layers.1", "model.embed_tokens"), None),
    ],
)
def test_what_is_frozen_has_no_gradient_of_its_own(
    lora: LoraConfig | None, frozen: tuple[str, ...], shares: float | None
) -> None:
    plain = dense_spec(type="LlamaConfig", tie_word_embeddings=False)
    spec = with_adapters(plain, lora, frozen)
    model = build_model(spec, dtype=torch.float32)
    found = training_flops(model, spec)
    assert found is not None
    names = {name: p for name, p in model.named_parameters() if "embed" not in name}
    if shares is not None:
        base = sum(p.numel() for name, p in names.items() if "lora" not in name)
        adapters = sum(p.numel() for name, p in names.items() if "lora" in name)
        assert found.products == pytest.approx(6 * base * shares + 6 * adapters)
        return
    low = sum(p.numel() for n, p in names.items() if ".layers.0." in n or ".layers.1." in n)
    every = sum(p.numel() for p in names.values())
    assert found.products == 2 * low + 6 * (every - low)
    assert [layer.per_key for layer in found.attention] == [2 * 128, 2 * 128, 6 * 128]


def counting() -> FlopCounterMode:
    """Torch's counter, which has no formula for the grouped product of experts."""

    def grouped(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
        # [tokens, k] x [experts, k, n], or for the weights [k, tokens] x [tokens, n].
        return 2 * a[0] * a[1] * b[-1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})


SPECS = {
    "grouped": lambda: dense_spec(type="LlamaConfig"),
    "experts": lambda: experts_spec("qwen3_moe"),
    "latent": lambda: experts_spec("deepseek_v3"),
    "transformers": lambda: module_spec("gpt_neox"),
}


@pytest.mark.parametrize("name", SPECS)
def test_torch_counts_the_same(name: str) -> None:
    """But for vectors, which are no products; and the first layer's gradient of its input, as the
    gradient of the embedding is no product either, is in both."""
    spec = SPECS[name]()
    model = build_model(spec, dtype=torch.float32, device="cpu")
    initialize(model, spec, 0)
    model.train()
    ids = torch.randint(3, 90, (2, LENGTH))
    with sdpa_kernel(SDPBackend.MATH), counting() as counter:
        model(ids).sum().backward()
    counted = counter.get_total_flops() / ids.numel()
    assert counted == pytest.approx(flops(spec) - 6 * vectors(model.named_parameters()))


def vectors(named: Iterable[tuple[str, nn.Parameter]]) -> int:
    return sum(p.numel() for _, p in named if p.ndim == 1)


def test_a_model_whose_attention_is_unknown_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import models.flops

    class Sizeless:
        def get_text_config(self) -> Any:
            return object()

    spec = module_spec("gpt_neox")
    monkeypatch.setattr(models.flops, "complete_config", lambda spec: Sizeless())
    assert training_flops(nn.Linear(2, 2), spec) is None
