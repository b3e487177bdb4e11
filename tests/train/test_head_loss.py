"""Head and loss in chunks of tokens: as without chunks, and without the logits of all tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.train.head_loss import HeadLoss, chunk_size, saves_memory
from launcher.train.loss import Loss, compiled_token_loss_sum, token_loss_sum
from models.layers import Embedding, Linear, TiedHead
from models.lora import LowRank
from models.lora_config import LoraConfig

ROWS, LENGTH, HIDDEN, VOCABULARY = 3, 10, 8, 41
CHUNK = 7
"""It divides neither the tokens nor a row."""
HEADS = ("plain", "bias", "tied", "rows of a tied one", "frozen", "adapter", "adapter off")


def head_of(kind: str, dtype: torch.dtype = torch.float32) -> Linear | TiedHead:
    torch.manual_seed(0)
    if "tied" in kind:
        embedding = Embedding(VOCABULARY + 9 * ("rows" in kind), HIDDEN)
        nn.init.normal_(embedding.weight)
        embedding.to(dtype)
        tied = TiedHead(embedding)
        if "rows" in kind:
            tied.views["weight"] = lambda weight: weight[4 : 4 + VOCABULARY]
        return tied
    head = Linear(HIDDEN, VOCABULARY, bias=kind == "bias")
    if kind.startswith("adapter"):
        head.lora_A, head.lora_B = Linear(HIDDEN, 2), Linear(2, VOCABULARY)
        head.register_parameter("lora_magnitude_vector", None)
        head.adapter = LowRank(LoraConfig(rank=2, alpha=4), ("lm_head",))
        head.adapter.enabled = kind == "adapter"
        head.weight.requires_grad_(False)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    if kind == "frozen":
        head.weight.requires_grad_(False)
    return head.to(dtype)


def parameters_of(head: Linear | TiedHead) -> list[nn.Parameter]:
    return [head.weight] if isinstance(head, TiedHead) else list(head.parameters())


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, :8] = -100  # a whole chunk without targets
    labels[2, 4] = -100
    return states.requires_grad_(), labels


def gradients(head: Linear | TiedHead, states: Tensor, objective: Tensor) -> list[Tensor | None]:
    wanted = [states, *(p for p in parameters_of(head) if p.requires_grad)]
    return list(torch.autograd.grad(objective, wanted, allow_unused=True))


def assert_close(mine: Any, expected: Any, rtol: float) -> None:
    for one, other in zip(mine, expected, strict=True):
        if one is None or other is None:
            assert one is None or not one.any()
            assert other is None or not other.any()
            continue
        assert one.dtype == other.dtype
        scale = float(other.float().abs().max())
        assert float((one.float() - other.float()).abs().max()) <= rtol * scale


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("chunk", [1, CHUNK, ROWS * LENGTH - 1])
def test_chunks_are_the_whole(kind: str, by_row: bool, chunk: int) -> None:
    """`by_row`: with another factor for each row, as losses on preferences have."""
    head, (states, labels) = head_of(kind), inputs()
    factors = torch.tensor([0.5, -2.0, 3.0]) if by_row else torch.tensor(0.7)
    expected = token_loss_sum(head(states), labels, by_row=by_row)
    found = HeadLoss(head, token_loss_sum, chunk)(states, labels, by_row=by_row)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert_close(
        gradients(head, states, (found * factors).sum()),
        gradients(head, states, (expected * factors).sum()),
        1e-6,
    )


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_objective_of_a_step(dtype: torch.dtype, scale: Any, by_row: bool) -> None:
    head, (states, labels) = head_of("plain", dtype), inputs(dtype)
    whole = token_loss_sum(head(states), labels, by_row=by_row)
    loss = HeadLoss(head, token_loss_sum, CHUNK)
    objective, sums = loss.objective(states, labels, scale, by_row=by_row)
    assert not sums.requires_grad
    assert sums.shape == whole.shape
    rtol = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert torch.allclose(sums, whole, rtol=rtol)
    expected = gradients(head, states, whole.sum() * scale)
    assert_close(gradients(head, states, objective), expected, rtol)
    with torch.no_grad():
        alone, sums_alone = loss.objective(states, labels, scale, by_row=by_row)
    assert torch.equal(alone, objective)
    assert torch.equal(sums_alone, sums)


@pytest.mark.parametrize("kind", HEADS)
def test_one_chunk_is_bitwise_the_whole(kind: str) -> None:
    head, (states, labels) = head_of(kind), inputs()
    expected = token_loss_sum(head(states), labels)
    loss = HeadLoss(head, token_loss_sum, ROWS * LENGTH)
    objective, sums = loss.objective(states, labels, 0.3)
    assert torch.equal(sums, expected)
    theirs = gradients(head, states, expected * 0.3)
    for one, other in zip(gradients(head, states, objective), theirs, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_split_backward_pass_runs_it_twice() -> None:
    head, (states, labels) = head_of("plain"), inputs()
    objective, _ = HeadLoss(head, token_loss_sum, CHUNK).objective(states, labels, 0.5)
    (of_states,) = torch.autograd.grad(objective, states, retain_graph=True)
    (of_weight,) = torch.autograd.grad(objective, head.weight)
    expected = gradients(head, states, token_loss_sum(head(states), labels) * 0.5)
    assert_close([of_states, of_weight], expected, 1e-6)


def test_the_weights_gradient_of_many_chunks_is_rounded_once() -> None:
    """Against float64: as near as the product of all tokens, however many chunks."""
    head, (states, labels) = head_of("plain", torch.bfloat16), inputs(torch.bfloat16)
    wide, (wide_states, _) = head_of("plain").double(), inputs(torch.float64)
    with torch.no_grad():
        wide.weight.copy_(head.weight)
        wide_states.copy_(states)
    exact = gradients(wide, wide_states, token_loss_sum(wide(wide_states).float(), labels))[1]
    assert exact is not None
    errors = []
    for chunk in (1, ROWS * LENGTH):
        loss = HeadLoss(head, token_loss_sum, chunk)
        found = gradients(head, states, loss.objective(states, labels, 1.0)[0])[1]
        assert found is not None
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[0] < 1.5 * errors[1]


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("by_row", [False, True])
def test_no_tensor_has_the_logits_of_all_tokens(kind: str, by_row: bool) -> None:
    head, (states, labels) = head_of(kind), inputs()
    loss, largest = HeadLoss(head, token_loss_sum, CHUNK), Largest()
    with largest:
        found = loss(states, labels, by_row=by_row)
        found.sum().backward()
    limit = max(CHUNK * VOCABULARY, *(p.numel() for p in parameters_of(head)))
    assert largest.elements <= limit < ROWS * LENGTH * VOCABULARY


COMPILED: Loss = compiled_token_loss_sum(
    partial(torch.compile, backend="aot_eager", fullgraph=True)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_the_compiled_loss(dtype: torch.dtype, by_row: bool) -> None:
    head, (states, labels) = head_of("plain", dtype), inputs(dtype)
    expected = token_loss_sum(head(states), labels, by_row=by_row)
    rtol = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for loss in (partial(_of_logits, head), HeadLoss(head, COMPILED, 5)):
        found = loss(states, labels, by_row=by_row)
        assert torch.allclose(found, expected, rtol=1e-6)
        assert_close(
            gradients(head, states, (found * 0.5).sum()),
            gradients(head, states, (token_loss_sum(head(states), labels) * 0.5).sum()),
            rtol,
        )


def _of_logits(head: Linear, states: Tensor, labels: Tensor, /, *, by_row: bool = False) -> Tensor:
    return COMPILED(head(states), labels, by_row=by_row)


def test_when_chunks_save_memory() -> None:
    chunk = chunk_size(128_256, torch.device("cuda"))
    assert chunk == 2048
    enough = partial(saves_memory, chunk=chunk, hidden=4096, dtype=torch.bfloat16)
    assert [enough(tokens, trained=True) for tokens in (4096, 8192)] == [False, True]
    assert [enough(tokens, trained=False) for tokens in (2048, 4096)] == [False, True]
    assert chunk_size(1 << 40, torch.device("cpu")) == 64
