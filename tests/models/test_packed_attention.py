"""Attention by documents: values, gradients, dropout, kernels; memory linear in the length."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import models.attention
import models.packed_attention
from models.attention import AttentionMask, StepContext, attend, attend_with_dropout
from models.decoder import Decoder
from models.documents import OnHost, document_lengths
from models.flash_attention import flash_backward, flash_forward
from models.packed_attention import attend_documents, attend_documents_with_dropout
from models.scores_attention import attend_tiles, attend_tiles_backward
from tests.dry_run.cuda_calls import fake_cuda
from tests.dry_run.virtual_cuda import DEVICE, DeviceError, VirtualCuda
from tests.models.tiny import dense_spec

ROWS = 2
CASES: dict[str, dict[str, Any]] = {
    "grouped heads": {"heads": 4, "kv_heads": 2},
    "one head each": {"heads": 3, "kv_heads": 3},
    "narrow values": {"heads": 2, "kv_heads": 2, "size": 24, "value_size": 16},
    "wide values": {"heads": 2, "kv_heads": 1, "size": 8, "value_size": 16},
    "window": {"heads": 4, "kv_heads": 2, "window": 7},
    "window above a document": {"heads": 2, "kv_heads": 1, "window": 90},
    "sinks": {"heads": 4, "kv_heads": 2, "sinks": True},
    "sinks and window": {"heads": 4, "kv_heads": 2, "sinks": True, "window": 20},
    "after a past": {"heads": 2, "kv_heads": 1, "queries": 37},
    "after a past, window": {"heads": 2, "kv_heads": 1, "queries": 37, "window": 20},
    "one document": {"heads": 2, "kv_heads": 1, "total": 300, "borders": 0.0, "window": 100},
    "long, after a past": {"heads": 2, "kv_heads": 1, "total": 700, "borders": 0.0, "queries": 600},
}


class Operands:
    """Random operands of one case, and the mask that says the same as their documents."""

    def __init__(
        self, *, heads: int, kv_heads: int, size: int = 16, value_size: int | None = None,
        total: int = 150, queries: int | None = None, window: int | None = None,
        borders: float = 0.05, sinks: bool = False, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        torch.manual_seed(7)
        queries = total if queries is None else queries
        self.ids = (torch.rand(ROWS, total) < borders).long().cumsum(1)
        self.lengths, self.window = document_lengths(self.ids), window
        shapes = [(heads, queries, size), (kv_heads, total, size),
                  (kv_heads, total, value_size or size)]  # fmt: skip
        self.tensors = [torch.randn(ROWS, *shape, dtype=dtype).requires_grad_() for shape in shapes]
        self.sinks = torch.randn(heads, dtype=dtype).requires_grad_() if sinks else None
        self.mask_object = AttentionMask(
            length=queries, total=total, device=torch.device("cpu"), document_ids=self.ids
        )
        mask = self.mask_object.mask(window, always=True)
        assert mask is not None
        self.mask = mask

    def gradients(self, output: Tensor) -> list[Tensor]:
        """The output, and the gradients of all operands."""
        leaves = [*self.tensors, *([] if self.sinks is None else [self.sinks])]
        weights = torch.linspace(-1, 2, output.numel()).view(output.shape).cos().to(output.dtype)
        return [output, *torch.autograd.grad(output, leaves, weights)]


def assert_close(found: list[Tensor], expected: list[Tensor], close: float = 2e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= close * max(1.0, float(other.detach().abs().max()))


def in_memory(given: Operands) -> Tensor:
    query = given.tensors[0]
    scale = query.shape[-1] ** -0.5
    found: Tensor = attend_tiles(
        *given.tensors, given.lengths, None, given.sinks, given.window, scale, torch.float32, 0.0, 0
    )
    return found


@pytest.mark.parametrize("case", CASES)
def test_documents_give_what_the_mask_gives(case: str) -> None:
    given = Operands(**CASES[case])
    expected = given.gradients(attend(*given.tensors, given.mask, sinks=given.sinks))
    found = attend_documents(*given.tensors, given.lengths, window=given.window, sinks=given.sinks)
    assert_close(given.gradients(found), expected)
    assert_close(given.gradients(in_memory(given)), expected)


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-13), ("bfloat16", 4e-2)])
def test_other_dtypes(dtype: str, close: float) -> None:
    given = Operands(heads=4, kv_heads=2, window=20, sinks=True, dtype=getattr(torch, dtype))
    expected = given.gradients(attend(*given.tensors, given.mask, sinks=given.sinks))
    found = attend_documents(*given.tensors, given.lengths, window=20, sinks=given.sinks)
    assert_close(given.gradients(found), expected, close)


@pytest.mark.parametrize("case", ["grouped heads", "sinks and window", "one document"])
def test_the_pattern_of_dropout_is_that_of_full_rows(case: str) -> None:
    given = Operands(**CASES[case])
    seeds, first_head = torch.tensor([5, 2**31 + 7]), 3
    heads, total = given.tensors[0].shape[1], given.ids.shape[1]
    lines = (torch.arange(heads) + first_head)[:, None] * total + torch.arange(total)
    common: dict[str, Any] = {"scale": None, "dtype": torch.float32, "probability": 0.3,
                              "seeds": seeds, "sinks": given.sinks}  # fmt: skip
    expected = attend_with_dropout(*given.tensors, given.mask, lines=lines, **common)
    found = attend_documents_with_dropout(
        *given.tensors, given.lengths, window=given.window, first_head=first_head, **common
    )
    assert_close(given.gradients(found), given.gradients(expected))


def test_the_operators_are_right_for_autograd_and_compilers() -> None:
    given = Operands(heads=4, kv_heads=2, total=20, sinks=True)
    scale = 0.25
    tensors = (*given.tensors, given.lengths)
    torch.library.opcheck(torch.ops.slipway.attend_documents, (*tensors, 6, scale, given.sinks))
    seeds = torch.tensor([3, 4])
    torch.library.opcheck(
        torch.ops.slipway.attend_tiles,
        (*tensors, seeds, given.sinks, 6, scale, torch.float32, 0.1, 0),
    )


def test_other_documents_do_not_compile_again() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(attend_documents, backend=count, fullgraph=True, dynamic=False)
    for borders in (0.0, 0.02, 0.5):
        given = Operands(heads=4, kv_heads=2, borders=borders)
        found = compiled(*given.tensors, given.lengths)
        expected = given.gradients(attend(*given.tensors, given.mask))
        assert_close(given.gradients(found), expected)
    assert len(graphs) == 1


# The way that attention takes.


def tiny(**changes: Any) -> Decoder:
    """One layer, with heads so small that nothing else is large."""
    spec = dense_spec(
        type="MistralConfig", hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2,
        n_kv_heads=1, head_dim=8, vocab_size=8, **changes,
    )  # fmt: skip
    assert spec.decoder is not None
    model = Decoder(spec.decoder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("case", "by_documents", "expected"),
    [
        ({}, True, "documents"),
        ({"borders": 0.0, "window": 20}, True, "documents"),
        ({"total": models.attention.MASK_UP_TO}, True, "mask"),
        ({}, False, "mask"),
    ],
)
def test_what_is_used_when(
    case: dict[str, Any], by_documents: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for name, ways in (("attend_documents", "documents"), ("attend", "mask")):
        plain = getattr(models.attention, name)

        def note(*args: Any, plain: Any = plain, ways: str = ways, **keywords: Any) -> Tensor:
            used.append(ways)
            return plain(*args, **keywords)

        monkeypatch.setattr(models.attention, name, note)
    given = Operands(heads=4, kv_heads=2, **case)
    layer = tiny().decoder_layers()[0].self_attn
    mask = AttentionMask(
        length=given.mask_object.length, total=given.mask_object.total, device=given.ids.device,
        document_ids=given.ids, by_documents=by_documents,
    )  # fmt: skip
    context = StepContext(cos=torch.empty(0), sin=torch.empty(0), mask=mask)
    layer.attend(*given.tensors, context, given.window)
    assert used == [expected]


def test_documents_that_are_not_consecutive_are_kept_apart_by_a_mask() -> None:
    ids = torch.tensor([[0] * 50 + [1] * 50 + [0] * 50])
    mask = AttentionMask(length=150, total=150, device=torch.device("cpu"), document_ids=ids)
    assert mask.documents(None) is None
    allowed = mask.mask(None)
    assert allowed is not None
    assert allowed[0, 0, 149, 0]
    assert not allowed[0, 0, 149, 60]


# CUDA, without a GPU: the arguments of its kernel, with the meaning that they have there.


def flash_reference(
    query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int,
    dropout: float, is_causal: bool, debug: bool, *, scale: float, window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Variable lengths; queries are aligned with the last keys; windows on both sides, -1: none."""
    assert cum_q.dtype == cum_k.dtype == torch.int32
    assert dropout == 0.0
    assert cum_q[-1] == len(query)
    assert cum_k[-1] == len(key) == len(value)
    assert max_q >= cum_q.diff().max()
    assert max_k == cum_k.diff().max()
    right = 0 if is_causal else window_size_right
    outputs, sums = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    groups = query.shape[1] // key.shape[1]
    for (q0, q1), (k0, k1) in zip(pairwise(cum_q), pairwise(cum_k), strict=True):
        keys, values = (t[k0:k1].repeat_interleave(groups, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], keys) * scale
        at = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        offset = torch.arange(k1 - k0) - at
        allowed = offset <= right
        if window_size_left >= 0:
            allowed &= offset >= -window_size_left
        scores = scores.masked_fill(~allowed, float("-inf"))
        outputs[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        sums[:, q0:q1] = scores.logsumexp(-1)
    empty = torch.empty(0)
    return outputs, sums, empty, empty, empty


def flash_gradient(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor,
    cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, dropout: float, is_causal: bool,
    rng: Tensor, unused: Tensor, *, scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From outputs and log-sum-exps as given, as the kernel has it."""
    groups = query.shape[1] // key.shape[1]
    found = [torch.zeros_like(t) for t in (query, key, value)]
    for (q0, q1), (k0, k1) in zip(pairwise(cum_q), pairwise(cum_k), strict=True):
        keys, values = (t[k0:k1].repeat_interleave(groups, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], keys) * scale
        at = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        offset = torch.arange(k1 - k0) - at
        allowed = offset <= (0 if is_causal else window_size_right)
        if window_size_left >= 0:
            allowed &= offset >= -window_size_left
        shares = (scores - sums[:, q0:q1, None]).exp().masked_fill(~allowed, 0.0)
        of_shares = torch.einsum("qhd,khd->hqk", gradient[q0:q1], values)
        mean = (gradient[q0:q1] * output[q0:q1]).sum(-1).T[..., None]
        of_scores = shares * (of_shares - mean) * scale
        found[0][q0:q1] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, query[q0:q1])
        of_values = torch.einsum("hqk,qhd->khd", shares, gradient[q0:q1])
        found[1][k0:k1] = of_keys.unflatten(1, (-1, groups)).sum(2)
        found[2][k0:k1] = of_values.unflatten(1, (-1, groups)).sum(2)
    return found[0], found[1], found[2]


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_of_cuda_gets_what_the_mask_says(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Operands(**CASES[case])
    expected = given.gradients(attend(*given.tensors, given.mask, sinks=given.sinks))
    monkeypatch.setattr(models.packed_attention, "kernel_of", lambda *_: "varlen")
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_reference)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_gradient)
    found = attend_documents(*given.tensors, given.lengths, window=given.window, sinks=given.sinks)
    assert_close(given.gradients(found), expected)


@pytest.mark.parametrize("window", [None, 128])
def test_torch_has_the_kernel_of_cuda_with_these_arguments(window: int | None) -> None:
    with FakeTensorMode():
        query = torch.empty(64, 8, 128, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(64, 2, 128, dtype=torch.bfloat16, device="cuda")
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        output, sums = flash_forward(query, key, key, (ends, ends, 40, 40), window, 0.1)
        assert (output.shape, sums.shape) == (query.shape, (8, 64))
        found = flash_backward(
            output, query, key, key, output, sums, (ends, ends, 40, 40), window, 0.1
        )
        assert [tensor.shape for tensor in found] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize(
    ("dtype", "size", "expected"),
    [(torch.bfloat16, 128, "varlen"), (torch.float16, 256, "varlen"),
     (torch.bfloat16, 264, "tiles"), (torch.float32, 128, "tiles")],
)  # fmt: skip
def test_the_kernel_of_a_device(dtype: torch.dtype, size: int, expected: str) -> None:
    kernel_of = models.packed_attention.kernel_of
    assert kernel_of(torch.device("cuda"), dtype, size) == expected
    assert kernel_of(torch.device("cpu"), dtype, size) == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_waits_for_a_gpu(dtype: torch.dtype, dropout: float) -> None:
    ids = torch.randint(8, (2, 100))
    documents = torch.repeat_interleave(torch.tensor([30, 1, 69]))[None].expand(2, -1)
    lengths = document_lengths(documents)
    with fake_cuda(), VirtualCuda() as device:
        model = tiny(sliding_window=20, attention_dropout=dropout).to(dtype).to(DEVICE)
        ids, documents, seeds = (t.to(DEVICE) for t in (ids, documents, torch.arange(2)))

        def step() -> None:
            logits = model(
                ids, document_ids=documents, document_lengths=OnHost(lengths), sample_seeds=seeds
            )
            logits.sum().backward()

        strict = device.strict(step, after=1)  # the first copies the frequencies of positions
        strict()
        strict()
        with pytest.raises(DeviceError, match="waits"):
            device.strict(model)(ids, document_ids=documents)


# Memory.

LONG = 8192


class _Largest(TorchDispatchMode):
    """The largest number of elements of a tensor made inside, in the operators of our own too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "slipway":
            with self:  # a mode is not on in what it calls
                return _BODIES[str(func)](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, list | tuple) else (result,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return result


_BODIES = {
    "slipway.attend_documents.default": models.packed_attention._attend._init_fn,
    "slipway.attend_documents_backward.default": models.packed_attention._attend_backward._init_fn,
    "slipway.attend_tiles.default": attend_tiles._init_fn,
    "slipway.attend_tiles_backward.default": attend_tiles_backward._init_fn,
}


@pytest.mark.parametrize("kind", ["documents", "window", "recompute", "dropout"])
def test_no_tensor_of_queries_times_keys(kind: str) -> None:
    model = tiny(
        attention_dropout=0.1 if kind == "dropout" else 0.0,
        sliding_window=512 if kind == "window" else None,
    )
    ids = torch.randint(8, (1, LONG))
    documents = torch.zeros_like(ids)
    if kind != "window":
        documents[:, torch.arange(700, LONG, 1000)] = 1
    given: dict[str, Any] = {"document_ids": documents.cumsum(1)}
    if kind == "dropout":
        given["sample_seeds"] = torch.tensor([3])
    with _Largest() as largest:
        if kind == "recompute":
            layer = model.decoder_layers()[0]
            plain = layer.forward
            layer.forward = lambda *a: checkpoint(plain, *a, use_reentrant=False)  # type: ignore
        model(ids, **given).sum().backward()
    assert LONG * 8 < largest.elements < LONG * LONG / 16
