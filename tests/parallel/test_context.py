"""Context parallelism: the tokens of each rank, and the same results as in one process.

Every comparison is max|difference| / max|reference| in float32 against the same decoder, or the
same attention, in one process with full rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launcher.parallel import world
from launcher.parallel.context import ContextParallel, apply_context_parallel, token_indices
from launcher.parallel.ring import chunks
from models.attention import StepContext, attend
from models.decoder import Decoder
from tests.models.tiny import EXPERTS, GLM, VOCABULARY, dense_spec, tokens
from tests.parallel.rows import (
    CLOSE,
    ROWS,
    TOTAL,
    context_of,
    documents_of_rows,
    error,
    operands,
    start,
    weights_like,
)
from tests.ranks import run_ranks

WINDOW = 7
WAYS = [("ring", 2), ("ring", 4), ("ulysses", 2), ("ulysses", 4), ("both", 4)]
MODELS = {
    "llama": {"type": "LlamaConfig"},
    "qwen3": {"type": "Qwen3Config", "head_dim": 24, "num_heads": 8, "n_kv_heads": 2},
    "qwen3 one key/value head": {"type": "Qwen3Config", "head_dim": 16, "n_kv_heads": 1},
    "deepseek": EXPERTS["deepseek_v3"],
    "glm": EXPERTS["glm4_moe"],
    "glm 9b": GLM["glm"],
    "gpt-oss": EXPERTS["gpt_oss"] | {"num_heads": 8, "n_kv_heads": 2},
}
PATTERNS = ("causal", "documents", "window", "documents and window")


# Which rank has which tokens.


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, [0, 1, 14, 15]), (1, [2, 3, 12, 13]), (3, [6, 7, 8, 9])]
)
def test_a_ring_rank_has_chunks_from_head_and_tail(rank: int, expected: list[int]) -> None:
    assert token_indices(16, 4, rank, balanced=True).tolist() == expected
    assert [place for chunk in chunks(16, 4, rank) for place in chunk] == expected


def test_a_ulysses_rank_has_consecutive_tokens() -> None:
    assert token_indices(16, 4, 2, balanced=False).tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(("total", "balanced"), [(12, True), (10, False)])
def test_tokens_that_cannot_be_split_equally_are_refused(total: int, balanced: bool) -> None:
    with pytest.raises(ValueError, match=f"{total} tokens cannot be"):
        token_indices(total, 4, 1, balanced=balanced)


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
    cp = start(way)
    try:
        return cp.length_unit, cp.token_indices(16).tolist()
    finally:
        world.stop()


# Full decoders.


EVERY_PAIR = [(model, pattern) for model in MODELS for pattern in PATTERNS]
EACH_ONCE = [(model, pattern) for model, pattern in EVERY_PAIR
             if model == "qwen3" or pattern == "documents and window"]  # fmt: skip


@pytest.mark.parametrize(
    "pairs", [EACH_ONCE, pytest.param(EVERY_PAIR, marks=pytest.mark.long)], ids=["each", "every"]
)
@pytest.mark.parametrize(("way", "size"), WAYS)
def test_logits_and_gradients_are_those_of_one_process(
    way: str, size: int, pairs: list[tuple[str, str]]
) -> None:
    for errors in run_ranks(size, _compare_decoders, way, pairs):
        assert len(errors) == len(pairs)
        assert all(max(error) <= CLOSE for error in errors), errors


def _compare_decoders(way: str, pairs: list[tuple[str, str]]) -> list[tuple[float, float]]:
    """(worst error of the logits, of the gradients) for every model and pattern."""
    cp = start(way)
    try:
        return [_compare(cp, model, pattern) for model, pattern in pairs]
    finally:
        world.stop()


def _compare(
    cp: ContextParallel, model: str, pattern: str, run: Callable[..., Tensor] | None = None
) -> tuple[float, float]:
    """`run(model, ids, **arguments)`: how the parallel decoder is called."""
    alone, shared = _decoder(model, pattern), _decoder(model, pattern)
    apply_context_parallel(shared, cp)
    ids = tokens(ROWS, TOTAL)
    documents = documents_of_rows() if pattern.startswith("documents") else None
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


def _positions(documents: Tensor | None) -> Tensor:
    """The order in each document."""
    order = torch.arange(TOTAL).expand(ROWS, -1)
    if documents is None:
        return order
    same = documents[:, :, None] == documents[:, None]
    return order - same.int().argmax(-1)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """A sum over the tokens, so that it can be split over ranks; each token has its own label."""
    return F.cross_entropy(logits.flatten(0, 1), (ids.flatten() * 7 + 3) % VOCABULARY,
                           reduction="sum")  # fmt: skip


def test_layers_may_be_recomputed_in_the_backward_pass() -> None:
    for errors in run_ranks(4, _compare_recomputed):
        assert max(errors) <= CLOSE, errors


def _compare_recomputed() -> tuple[float, float]:
    cp = start("both")
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
    cp = start(way)
    try:
        return _compare(cp, "qwen3", "documents", _compiled)
    finally:
        world.stop()


def _compiled(model: Decoder, ids: Tensor, **arguments: Tensor) -> Tensor:
    for layer in model.model.layers.values():
        layer.compile(backend="aot_eager")
    return model(ids, **arguments)


def test_a_model_called_with_full_rows_does_not_communicate() -> None:
    assert run_ranks(2, _full_rows) == [0.0, 0.0]


def _full_rows() -> float:
    cp = start("ring")
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
    """The interface of an attention layer."""

    scale = 0.37

    def prepare(self, context: StepContext) -> None:
        """Nothing is cached."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: StepContext, window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return attend(query, key, value, context.mask.mask(window), scale=self.scale, sinks=sinks)


def _compare_latent(way: str) -> list[float]:
    """The errors of outputs and of the gradients of queries, keys and values."""
    cp = start(way)
    try:
        layer, documents = _Latent(), documents_of_rows()
        full = [t.requires_grad_() for t in operands(heads=4, shared=4, sizes=(12, 12, 8))]
        expected = layer.attend(*full, context_of(None, documents), None)
        (expected * weights_like(expected)).sum().backward()
        own = cp.token_indices(TOTAL)
        parts = [t.detach()[:, :, own].requires_grad_() for t in full]
        model = _model_of(layer)
        apply_context_parallel(model, cp)
        found = layer.attend(*parts, context_of(own, documents), None)
        (found * weights_like(expected)[:, :, own]).sum().backward()
        pairs = zip(full, parts, strict=True)
        errors = [error(a.grad[:, :, own], b.grad) for a, b in pairs]
        return [error(expected[:, :, own], found), *errors]
    finally:
        world.stop()


class _Namespace:
    def __init__(self, **values: object) -> None:
        self.__dict__ |= values


def _model_of(layer: _Latent) -> Decoder:
    """Just enough of a decoder to reach its attention."""
    layers = [_Namespace(self_attn=layer)]
    return _Namespace(decoder_layers=lambda: layers, modules=list)  # type: ignore[return-value]
