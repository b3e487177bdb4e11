"""Context parallelism: which rank has which tokens, and that nobody can tell from the results.

Every comparison is max|difference| / max|reference| in float32 against the same decoder, or the
same attention, in one process with whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from launcher.parallel import ring, world
from launcher.parallel.context import ContextParallel, apply_context_parallel, token_indices
from launcher.parallel.ring import Ring, chunks, ring_attention
from models.attention import AttentionMask, StepContext, attend
from models.decoder import Decoder
from tests.models.tiny import EXPERTS, VOCABULARY, dense_spec, tokens
from tests.ranks import run_ranks

ROWS, TOTAL = 2, 32
CLOSE = 1e-5
WINDOW = 7
WAYS = [("ring", 2), ("ring", 4), ("ulysses", 2), ("ulysses", 4), ("both", 4)]
MODELS = {
    "llama": {"type": "LlamaConfig"},
    "qwen3": {"type": "Qwen3Config", "head_dim": 24, "num_heads": 8, "n_kv_heads": 2},
    "qwen3 one key/value head": {"type": "Qwen3Config", "head_dim": 16, "n_kv_heads": 1},
    "deepseek": EXPERTS["deepseek_v3"],
    "glm": EXPERTS["glm4_moe"],
}
PATTERNS = ("causal", "documents", "window", "documents and window")


# Which rank has which tokens.


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, [0, 1, 14, 15]), (1, [2, 3, 12, 13]), (3, [6, 7, 8, 9])]
)
def test_a_ring_deals_chunks_from_head_and_tail(rank: int, expected: list[int]) -> None:
    assert token_indices(16, 4, rank, balanced=True).tolist() == expected
    assert [place for chunk in chunks(16, 4, rank) for place in chunk] == expected


def test_a_trade_deals_consecutive_tokens() -> None:
    assert token_indices(16, 4, 2, balanced=False).tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(("total", "balanced"), [(12, True), (10, False)])
def test_tokens_that_cannot_be_shared_equally_are_refused(total: int, balanced: bool) -> None:
    with pytest.raises(ValueError, match=f"{total} tokens cannot be"):
        token_indices(total, 4, 1, balanced=balanced)


def test_causal_work_in_a_ring_is_equal_at_every_step() -> None:
    size, total = 4, 64
    for step in range(size):
        work = {
            sum(
                len(range(*piece.queries.indices(total))) * len(range(*piece.keys.indices(total)))
                for piece in _At(size, rank, total).pieces((rank - step) % size, lines=1)
            )
            for rank in range(size)
        }
        assert len(work) == 1


class _At(Ring):
    """A ring as one of its ranks sees it, without any process group."""

    def __init__(self, size: int, rank: int, total: int, window: int | None = None) -> None:
        mask = AttentionMask(length=total // size, total=total, device=torch.device("cpu"),
                      token_indices=token_indices(total, size, rank, balanced=True))  # fmt: skip
        for name, value in {"mask": mask, "window": window, "at": (rank, size)}.items():
            object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        return self.at[0]

    @property
    def size(self) -> int:
        return self.at[1]


@pytest.mark.parametrize("window", [None, 5, 16, 64])
@pytest.mark.parametrize("scores", [1 << 25, 64])
def test_pieces_cover_what_may_be_seen_once(
    window: int | None, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ring.SCORES, "cpu", scores)
    size, total = 4, 48
    seen = torch.zeros(total, total, dtype=torch.int64)
    for rank in range(size):
        at = _At(size, rank, total, window)
        for source in range(size):
            keys = token_indices(total, size, source, balanced=True)
            for piece in at.pieces(source, lines=2):
                lines, columns = at.mask.token_indices[piece.queries], keys[piece.keys]
                assert 2 * len(lines) * len(columns) <= scores
                mask = torch.ones(()) if piece.mask is None else piece.mask[0, 0]
                seen[lines[:, None], columns] += mask.long()
    order = torch.arange(total)
    expected = order[:, None] >= order
    if window is not None:
        expected &= order > order[:, None] - window
    assert torch.equal(seen, expected.long())


@pytest.mark.parametrize(("way", "size"), WAYS)
def test_every_token_is_on_one_rank(way: str, size: int) -> None:
    shares = run_ranks(size, _places, way)
    units = {unit for unit, _ in shares}
    assert units == {{"ring": 2 * size, "ulysses": size, "both": 4}[way]}
    assert sorted(place for _, share in shares for place in share) == list(range(16))
    if way == "both":
        assert [share for _, share in shares] == [
            [0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]
        ]  # fmt: skip


def _places(way: str) -> tuple[int, list[int]]:
    cp = _start(way)
    try:
        return cp.length_unit, cp.token_indices(16).tolist()
    finally:
        world.stop()


def _start(way: str) -> ContextParallel:
    """Join the group: all ranks are one ring or one trade, or `both`: trades of two."""
    here = world.start(force_cpu=True)
    everyone = dist.new_group(list(range(here.size)))
    if way != "both":
        return ContextParallel(**{way: everyone})
    pairs = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    ulysses, ring_ = (dist.new_subgroups_by_enumeration(ranks)[0] for ranks in pairs)
    return ContextParallel(ulysses=ulysses, ring=ring_)


# Whole decoders.


@pytest.mark.parametrize(("way", "size"), WAYS)
def test_logits_and_gradients_are_those_of_one_process(way: str, size: int) -> None:
    for errors in run_ranks(size, _compare_decoders, way):
        assert set(errors) == {f"{model}: {pattern}" for model in MODELS for pattern in PATTERNS}
        assert all(max(error) <= CLOSE for error in errors.values()), errors


def _compare_decoders(way: str) -> dict[str, tuple[float, float]]:
    """(worst error of the logits, of the gradients) for every model and pattern."""
    cp = _start(way)
    try:
        return {
            f"{model}: {pattern}": _compare(cp, model, pattern)
            for model in MODELS
            for pattern in PATTERNS
        }
    finally:
        world.stop()


def _compare(
    cp: ContextParallel, model: str, pattern: str, run: Callable[..., Tensor] | None = None
) -> tuple[float, float]:
    """`run(model, ids, **arguments)`: how the shared decoder is called."""
    alone, shared = _decoder(model, pattern), _decoder(model, pattern)
    apply_context_parallel(shared, cp)
    ids = tokens(ROWS, TOTAL)
    documents = _documents() if pattern.startswith("documents") else None
    positions = _positions(documents)
    expected = alone(ids, document_ids=documents, position_ids=positions)
    _loss(expected, ids).backward()

    own = cp.token_indices(TOTAL)
    found = (run or shared.__class__.__call__)(
        shared,
        ids[:, own],
        position_ids=positions[:, own],
        document_ids=documents,
        token_indices=own,
        total=TOTAL,
    )
    _loss(found, ids[:, own]).backward()
    for parameter in shared.parameters():
        dist.all_reduce(parameter.grad)
    pairs = zip(alone.parameters(), shared.parameters(), strict=True)
    worst = max(error(theirs.grad, ours.grad) for theirs, ours in pairs)
    return error(expected[:, own], found), worst


def _decoder(model: str, pattern: str) -> Decoder:
    spec = dense_spec(**MODELS[model])
    assert spec.decoder is not None
    config = spec.decoder
    if pattern.endswith("window"):
        config = replace(config, sliding_window=(WINDOW, None, 2 * WINDOW))
    decoder = Decoder(config, spec.precision)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.1 * noise)
    return decoder.train()


def _documents() -> Tensor:
    """Rows of several documents, cut at places of no importance to any chunk."""
    ends = torch.tensor([[3, 14, 15, TOTAL], [9, 10, 25, TOTAL]])
    return (torch.arange(TOTAL) >= ends[..., None]).sum(1)


def _positions(documents: Tensor | None) -> Tensor:
    """The order in each document."""
    order = torch.arange(TOTAL).expand(ROWS, -1)
    if documents is None:
        return order
    same = documents[:, :, None] == documents[:, None]
    return order - same.int().argmax(-1)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """A sum over the tokens, so that shares of it add up; each token has a label of its own."""
    return F.cross_entropy(logits.flatten(0, 1), (ids.flatten() * 7 + 3) % VOCABULARY,
                           reduction="sum")  # fmt: skip


def error(expected: Tensor, found: Tensor) -> float:
    """max|difference| / max|expected|."""
    return ((expected - found).abs().max() / expected.abs().max()).item()


def test_layers_may_be_recomputed_in_the_backward_pass() -> None:
    for errors in run_ranks(4, _compare_recomputed):
        assert max(errors) <= CLOSE, errors


def _compare_recomputed() -> tuple[float, float]:
    cp = _start("both")
    try:
        return _compare(cp, "qwen3", "documents", _recomputing)
    finally:
        world.stop()


def _recomputing(model: Decoder, ids: Tensor, **arguments: Tensor) -> Tensor:
    for layer in model.model.layers.values():
        layer.forward = _recomputed(layer.forward)
    return model(ids, **arguments)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_layers_may_be_compiled(way: str) -> None:
    for errors in run_ranks(2, _compare_compiled, way):
        assert max(errors) <= CLOSE, errors


def _compare_compiled(way: str) -> tuple[float, float]:
    cp = _start(way)
    try:
        return _compare(cp, "qwen3", "documents", _compiled)
    finally:
        world.stop()


def _compiled(model: Decoder, ids: Tensor, **arguments: Tensor) -> Tensor:
    for layer in model.model.layers.values():
        layer.compile(backend="aot_eager")
    return model(ids, **arguments)


def test_a_model_called_with_whole_rows_computes_alone() -> None:
    assert run_ranks(2, _whole_rows) == [0.0, 0.0]


def _whole_rows() -> float:
    cp = _start("ring")
    try:
        alone, shared = _decoder("llama", "causal"), _decoder("llama", "causal")
        apply_context_parallel(shared, cp)
        ids = tokens(1, 5 + dist.get_rank())  # of any length, and not the same on every rank
        return error(alone(ids), shared(ids))
    finally:
        world.stop()


# Attention by itself.


@pytest.mark.parametrize(("way", "size"), [("ring", 4), ("ulysses", 2), ("both", 4)])
def test_values_may_have_another_size_and_scores_another_scale(way: str, size: int) -> None:
    for errors in run_ranks(size, _compare_latent, way):
        assert max(errors) <= CLOSE, errors


class _Latent:
    """What is asked of an attention layer."""

    scale = 0.37

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: StepContext, window: int | None
    ) -> Tensor:
        return attend(query, key, value, context.mask.mask(window), scale=self.scale)


def _compare_latent(way: str) -> list[float]:
    """The errors of outputs and of the gradients of queries, keys and values."""
    cp = _start(way)
    try:
        layer, documents = _Latent(), _documents()
        whole = [t.requires_grad_() for t in _operands(heads=4, shared=4, sizes=(12, 12, 8))]
        expected = layer.attend(*whole, _context(None, documents), None)
        (expected * _weights(expected)).sum().backward()
        own = cp.token_indices(TOTAL)
        parts = [t.detach()[:, :, own].requires_grad_() for t in whole]
        model = _model_of(layer)
        apply_context_parallel(model, cp)
        found = layer.attend(*parts, _context(own, documents), None)
        (found * _weights(expected)[:, :, own]).sum().backward()
        pairs = zip(whole, parts, strict=True)
        errors = [error(a.grad[:, :, own], b.grad) for a, b in pairs]
        return [error(expected[:, :, own], found), *errors]
    finally:
        world.stop()


def _operands(
    *, heads: int, shared: int, sizes: tuple[int, int, int], total: int = TOTAL
) -> list[Tensor]:
    torch.manual_seed(3)
    return [
        torch.randn(ROWS, count, total, size)
        for count, size in zip((heads, shared, shared), sizes, strict=True)
    ]


def _context(own: Tensor | None, documents: Tensor | None) -> StepContext:
    length = TOTAL if own is None else len(own)
    mask = AttentionMask(length=length, total=TOTAL, device=torch.device("cpu"), token_indices=own,
                  document_ids=documents)  # fmt: skip
    return StepContext(cos=torch.empty(0), sin=torch.empty(0), mask=mask)


def _weights(like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, like.numel()).view(like.shape).cos()


class _Namespace:
    def __init__(self, **values: object) -> None:
        self.__dict__ |= values


def _model_of(layer: _Latent) -> Decoder:
    """Just enough of a decoder to reach its attention."""
    layers = {"0": _Namespace(self_attn=layer)}
    return _Namespace(model=_Namespace(layers=layers), modules=list)  # type: ignore[return-value]


def test_padding_is_seen_by_nobody_and_harms_nobody() -> None:
    for worst in run_ranks(2, _compare_padded):
        assert worst <= CLOSE


def _compare_padded() -> float:
    cp = _start("ring")
    try:
        key_mask = torch.arange(TOTAL) >= torch.tensor([[5], [0]])
        query, key, value = _operands(heads=4, shared=2, sizes=(8, 8, 8))
        device, own = torch.device("cpu"), cp.token_indices(TOTAL)
        whole = AttentionMask(length=TOTAL, total=TOTAL, device=device, key_mask=key_mask)
        part = AttentionMask(
            length=len(own), total=TOTAL, device=device, token_indices=own, key_mask=key_mask
        )
        expected = attend(query, key, value, whole.mask(None))[:, :, own]
        assert cp.ring is not None
        parts = (t[:, :, own] for t in (query, key, value))
        return error(expected, ring_attention(*parts, Ring(cp.ring, part, None)))
    finally:
        world.stop()


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-13), ("bfloat16", 2e-2)])
def test_other_dtypes_keep_what_accuracy_they_have(dtype: str, close: float) -> None:
    for errors in run_ranks(2, _compare_in, dtype):
        assert max(errors) <= close, errors


def _compare_in(dtype: str) -> list[float]:
    cp = _start("ring")
    try:
        whole = [t.to(getattr(torch, dtype)).double().requires_grad_()
                 for t in _operands(heads=4, shared=2, sizes=(8, 8, 8))]  # fmt: skip
        expected = attend(*whole, None)
        expected.backward(_weights(expected))
        own = cp.token_indices(TOTAL)
        parts = [t.detach()[:, :, own].to(getattr(torch, dtype)).requires_grad_() for t in whole]
        assert cp.ring is not None
        found = ring_attention(*parts, Ring(cp.ring, _context(own, None).mask, None))
        found.backward(_weights(expected)[:, :, own].to(found.dtype))
        pairs = [(expected[:, :, own], found)]
        pairs += [(a.grad[:, :, own], b.grad) for a, b in zip(whole, parts, strict=True)]
        assert all(b.dtype == getattr(torch, dtype) for _, b in pairs)
        return [error(a, b.double()) for a, b in pairs]
    finally:
        world.stop()


# Memory and repeatability of a ring.


class _Largest(TorchDispatchMode):
    """The most elements any tensor had that was made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_a_ring_never_holds_all_scores_and_gives_the_same_bits_each_time() -> None:
    for largest, repeated in run_ranks(4, _long_row):
        assert repeated
        # Rows, heads, and a chunk of queries by a chunk of keys; all scores are 64 times as many.
        assert largest == ROWS * 2 * 64 * 64


def _long_row() -> tuple[int, bool]:
    cp = _start("ring")
    try:
        total = 512
        own = cp.token_indices(total)
        mask = AttentionMask(
            length=len(own),
            total=total,
            device=torch.device("cpu"),
            token_indices=own,
            document_ids=(torch.arange(total) // 100).expand(ROWS, -1),
        )
        assert cp.ring is not None
        results = []
        with _Largest() as largest:
            for _ in range(2):
                operands = _operands(heads=2, shared=1, sizes=(8, 8, 8), total=len(own))
                parts = [t.requires_grad_() for t in operands]
                output = ring_attention(*parts, Ring(cp.ring, mask, None))
                output.backward(_weights(output))
                results.append([output, *(part.grad for part in parts)])
        same = (torch.equal(a, b) for a, b in zip(*results, strict=True))
        return largest.elements, all(same)
    finally:
        world.stop()
