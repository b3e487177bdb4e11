"""What layers compute in inference mode equals what they compute in training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.grouped import Groups, grouped_linear
from models.layers import Linear, RMSNorm
from models.products import linear
from models.rope import rotate, rotate_wide, widened

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inferred(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    with torch.inference_mode():
        return linear(states, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_inference_are_close_to_those_of_training(
    rows: int, dtype: torch.dtype, with_bias: bool
) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(1, rows, 48, dtype=dtype), torch.randn(40, 48, dtype=dtype)
    bias = torch.randn(40, dtype=dtype) if with_bias else None
    expected = F.linear(states, weight, bias)
    assert torch.equal(linear(states, weight, bias), expected)
    found = inferred(weight, bias, states)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_weights_that_are_views_of_others() -> None:
    torch.manual_seed(0)
    states, stack = torch.randn(3, 32), torch.randn(24, 64)
    for weight in (stack[4:12, :32], stack[5:9].view(8, 32), stack[:, :8].reshape(6, 32)):
        torch.testing.assert_close(inferred(weight, None, states), F.linear(states, weight))
    transposed = torch.randn(32, 16).T
    torch.testing.assert_close(inferred(transposed, None, states), F.linear(states, transposed))


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 0, 0], [0, 6, 0, 0]])
def test_experts_without_tokens_are_left_out_in_inference(counts: list[int]) -> None:
    torch.manual_seed(0)
    tokens, weight = torch.randn(sum(counts), 16), torch.randn(4, 24, 16)
    expected = grouped_linear(tokens, weight, Groups(torch.tensor(counts)))
    with torch.inference_mode():
        found = grouped_linear(tokens, weight, Groups(torch.tensor(counts)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_views_of_a_layer_are_used_in_inference() -> None:
    layer = Linear(32, 24)
    torch.nn.init.normal_(layer.weight)
    layer.views["weight"] = lambda weight: weight[8:16] * 2
    states = torch.randn(2, 32)
    with torch.inference_mode():
        found = layer(states)
    torch.testing.assert_close(found, F.linear(states, layer.weight[8:16] * 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_norms_of_inference_equal_those_of_training(
    dtype: torch.dtype, compute: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(40, 1e-5, compute).to(dtype)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(2, 3, 40).to(dtype) * 3
    with torch.inference_mode():
        found = norm(states)
    assert torch.equal(found, norm(states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 8])
def test_wide_tables_rotate_bit_by_bit_as_the_others(
    width: int, interleaved: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 3, 5, 16).to(dtype)
    angles = torch.randn(2, 1, 5, width // 2)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = rotate(states, *tables, interleaved=interleaved)
    found = rotate_wide(states, *widened(*tables), interleaved=interleaved)
    assert torch.equal(found, expected)


def test_the_tensors_of_inference_do_not_stay_in_a_model() -> None:
    """A model that has generated can be trained."""
    from models.cache import KVCache
    from tests.models.tiny import dense_spec, pair, tokens

    own, _ = pair(dense_spec(type="Qwen3Config", head_dim=16))
    twin = copy.deepcopy(own)
    ids = tokens(2, 12)
    with torch.inference_mode():
        own.eval()(ids, cache=KVCache())
        own.eval()(ids)
    for model in (own, twin):
        model.train()(ids).square().sum().backward()
    gradients = ([p.grad for p in model.parameters()] for model in (own, twin))
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
