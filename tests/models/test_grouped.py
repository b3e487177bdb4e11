"""Grouped products: which kernel computes them, what the host reads, and sums of experts' outputs.

A GPU is played by what asks for it: the capability of the device, and `is_cuda` of a weight.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models.grouped
from launcher.host_reads import counted_host_reads
from models.grouped import Groups, grouped_linear, has_kernel
from models.moe import Experts, weighted_sum

COUNTS = [3, 0, 5, 0]


class OnCuda(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def on_cuda(tensor: Tensor) -> Any:
    return tensor.as_subclass(OnCuda)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(major: int) -> None:
        monkeypatch.setattr(models.grouped, "_capability", lambda device: major)

    return of


@pytest.mark.parametrize(
    ("major", "dtype", "inner", "kernel"),
    [
        (9, torch.bfloat16, 16, True), (10, torch.bfloat16, 16, True),
        (8, torch.bfloat16, 16, False), (12, torch.bfloat16, 16, False),
        (9, torch.float32, 16, False), (9, torch.float16, 16, False),
        (9, torch.bfloat16, 12, False),
    ],
)  # fmt: skip
def test_a_kernel_runs_where_torch_has_one(
    major: int, dtype: torch.dtype, inner: int, kernel: bool, capability: Any
) -> None:
    capability(major)
    weight = on_cuda(torch.randn(4, inner, 16).to(dtype))
    assert has_kernel(weight) is kernel
    rows, groups = torch.randn(8, 16).to(dtype), Groups(torch.tensor(COUNTS))
    with counted_host_reads() as reads:
        found = grouped_linear(rows, weight, groups)
        grouped_linear(rows, weight, groups)
    assert dict(reads) == ({} if kernel else {"group sizes": 1}), "once for all products"
    parts = zip(rows.split(COUNTS), weight.as_subclass(Tensor), strict=True)
    expected = torch.cat([F.linear(part, matrix) for part, matrix in parts])
    torch.testing.assert_close(found.as_subclass(Tensor), expected)


def test_known_sizes_are_not_read() -> None:
    groups = Groups(torch.tensor(COUNTS), COUNTS)
    with counted_host_reads() as reads:
        grouped_linear(torch.randn(8, 6), torch.randn(4, 3, 6), groups)  # aligned to nothing
    assert not reads


class Garbage(torch.autograd.Function):
    """`F.grouped_mm` whose gradient of an empty group is NaN, as kernels of Blackwell may leave."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends)
        return rows.new_zeros(len(rows), weight.shape[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, ends = ctx.saved_tensors
        of_weight = torch.ones(len(ends), rows.shape[1], gradient.shape[1], dtype=rows.dtype)
        of_weight[ends.diff(prepend=ends.new_zeros(1)) == 0] = torch.nan
        return rows, of_weight, None


@pytest.mark.parametrize("major", [9, 10])
def test_experts_without_tokens_have_no_gradient_on_any_gpu(
    major: int, capability: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability(major)
    monkeypatch.setattr(
        F, "grouped_mm", lambda rows, weight, offs: Garbage.apply(rows, weight, offs)
    )
    weight = torch.randn(4, 16, 16).bfloat16().requires_grad_()
    rows = torch.randn(8, 16).bfloat16().requires_grad_()
    grouped_linear(rows, on_cuda(weight), Groups(torch.tensor(COUNTS))).sum().backward()
    assert weight.grad is not None
    assert [bool((g == 1).all()) for g in weight.grad] == [True, False, True, False]
    assert bool((weight.grad[[1, 3]] == 0).all()) is (major == 10)


def test_a_gpu_without_tokens_gives_every_matrix_a_gradient(capability: Any) -> None:
    capability(9)
    weight = torch.randn(4, 16, 16).bfloat16().requires_grad_()
    nothing = torch.zeros(0, 16).bfloat16()
    grouped_linear(nothing, on_cuda(weight), Groups(torch.zeros(4).long())).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_products_of_experts_read_group_sizes_once() -> None:
    experts = Experts(4, 6, 10, "silu")  # aligned to nothing
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    with counted_host_reads() as reads:
        experts(torch.randn(8, 6), Groups(torch.tensor(COUNTS))).sum().backward()
    assert dict(reads) == {"group sizes": 1}


# The weighted sum of the outputs of each token's experts.


def sorted_choices(tokens: int, k: int, experts: int = 8) -> tuple[Tensor, Tensor]:
    flat = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).flatten()
    order = flat.argsort(stable=True)
    return order, order.argsort()


def by_one_product(outputs: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """With a float32 tensor [n, k, hidden]."""
    return (outputs[inverse].unflatten(0, weights.shape).float() * weights[..., None]).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_outputs_of_experts_are_weighted_and_added(dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(0)
    order, inverse = sorted_choices(24, k)
    outputs = torch.randn(24 * k, 32).to(dtype).requires_grad_()
    weights = torch.rand(24, k).requires_grad_()
    found = weighted_sum(outputs, weights, order, inverse)
    wide, wide_weights = (t.detach().double().requires_grad_() for t in (outputs, weights))
    expected = (wide[inverse].unflatten(0, weights.shape) * wide_weights[..., None]).sum(1)
    assert found.dtype == dtype
    accuracy = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(found, expected.to(dtype), **accuracy)
    upstream = torch.randn(24, 32).to(dtype)
    found.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(outputs.grad, wide.grad.to(dtype), **accuracy)
    torch.testing.assert_close(weights.grad, wide_weights.grad.float(), rtol=1e-4, atol=1e-4)


def test_sixteen_bits_lose_nothing_against_one_float32_product() -> None:
    """The gradient of the outputs is the same bit for bit, and the sum rounded once."""
    torch.manual_seed(0)
    order, inverse = sorted_choices(64, 8)
    upstream = torch.randn(64, 32).bfloat16()
    results = []
    for form in ("sum", "product"):
        outputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        weights = torch.rand(64, 8, generator=torch.Generator().manual_seed(2))
        leaves = outputs.requires_grad_(), weights.requires_grad_()
        if form == "sum":
            result = weighted_sum(*leaves, order, inverse)
        else:
            result = by_one_product(*leaves, inverse).bfloat16()
        result.backward(upstream)
        results.append((result.detach(), leaves[0].grad, leaves[1].grad))
    (found, of_outputs, of_weights), (expected, *gradients) = results
    assert torch.equal(of_outputs, gradients[0])
    torch.testing.assert_close(of_weights, gradients[1], rtol=1e-5, atol=1e-5)
    # Other orders of a float32 sum differ by less than a rounding to bfloat16 now and then.
    assert (found != expected).float().mean() < 0.01
    torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


class _Float32(TorchDispatchMode):
    """The largest float32 tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


def test_sixteen_bits_make_no_float32_copy_of_all_outputs() -> None:
    n, k, hidden = 24, 8, 32
    order, inverse = sorted_choices(n, k)
    outputs = torch.randn(n * k, hidden).bfloat16().requires_grad_()
    weights = torch.rand(n, k).requires_grad_()
    with _Float32() as seen:
        weighted_sum(outputs, weights, order, inverse).sum().backward()
    assert seen.largest == n * hidden
