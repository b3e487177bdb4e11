"""The hooks for parallelism: split tokens, heads or layers give the results of unsplit ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import AttentionMask, BaseAttention, StepContext
from models.cache import KVCache
from models.decoder import Attention, Decoder, DecoderLayer
from models.dropout import ATTENTION_OUTPUT
from models.layers import Leaf, TiedHead
from tests.models.tiny import EXPERTS, GLM, dense_spec, experts_spec, pair, tokens

DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.1}
SEEDS = torch.tensor([5, 2**40 + 7])
PLACES = [torch.tensor([0, 1, 2, 9, 10, 11]), torch.tensor([3, 4, 5, 6, 7, 8])]
"""Two ranks with a row of 12 tokens, one with its head and its tail."""


def attentions(model: Decoder) -> list[BaseAttention]:
    return [module for module in model.modules() if isinstance(module, BaseAttention)]


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"type": "Qwen3Config", "head_dim": 16},
    "glm4": GLM["glm4"],
    "qwen2 window": {
        "type": "Qwen2Config", "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "deepseek_v3", "glm4_moe", "gpt_oss"])
def test_any_tokens_of_a_row_give_the_logits_of_the_full_row(name: str, packed: bool) -> None:
    """With dropout. The keys and values of all tokens, which context parallelism gathers, are taken
    from a run over full rows."""
    spec = experts_spec(name, **DROPOUT) if name not in MODELS else dense_spec(
        **MODELS[name], **DROPOUT
    )  # fmt: skip
    own, _ = pair(spec)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for module in attentions(own):
        plain = module.attend

        def keep(query: Tensor, key: Tensor, value: Tensor, context: StepContext,
                 window: int | None, sinks: Tensor | None = None, *, plain=plain,
                 layer=module.layer) -> Tensor:  # fmt: skip
            full = kept.setdefault(layer, (key, value))
            return plain(query, *full, context, window, sinks)

        module.attend = keep
    input_ids = tokens(2, 12)
    documents = torch.arange(12).repeat(2, 1) // 5 if packed else None
    given = {"document_ids": documents, "sample_seeds": SEEDS}
    full = own(input_ids, **given)
    for token_indices in PLACES:
        part = own(input_ids[:, token_indices], token_indices=token_indices, total=12, **given)
        torch.testing.assert_close(part, full[:, token_indices])
    assert len(kept) == 3


def test_gathered_rows_are_seen_full() -> None:
    """Attention that has gathered all tokens uses the sight of full rows, plain where it can."""
    mask = AttentionMask(length=6, total=12, device=torch.device("cpu"), token_indices=PLACES[0])
    assert mask.mask(None) is not None
    full = mask.full()
    assert full.mask(None) is None
    assert full.full() is full
    assert torch.equal(full.token_indices, torch.arange(12))
    assert full.mask(4) is not None
    documents = torch.arange(12)[None] // 5
    packed = AttentionMask(length=6, total=12, device=torch.device("cpu"), token_indices=PLACES[0],
                   document_ids=documents)  # fmt: skip
    full = packed.full().mask(4)
    assert full is not None
    assert torch.equal(packed.mask(4), full[:, :, PLACES[0]])
    block = packed.mask(4, PLACES[0], PLACES[1])
    assert torch.equal(block, full[:, :, PLACES[0]][..., PLACES[1]])
    assert packed.mask(4) is packed.mask(4)


def test_a_sight_of_the_newest_tokens() -> None:
    past = AttentionMask(length=2, total=5, device=torch.device("cpu"))
    assert past.mask(None).tolist() == [[[[True] * 4 + [False], [True] * 5]]]
    assert AttentionMask(length=1, total=5, device=torch.device("cpu")).mask(None) is None


@pytest.mark.parametrize("key_heads", [2, 4])
def test_half_the_heads_give_half_the_sum(key_heads: int) -> None:
    """With dropout on the shares: `first_head` numbers the heads."""
    spec = dense_spec(type="Qwen3Config", head_dim=16, n_kv_heads=key_heads, **DROPOUT)
    own, _ = pair(spec)
    attention = own.model.layers["1"].self_attn
    assert isinstance(attention, Attention)
    states = torch.randn(2, 12, 64)
    context = context_of(own, states)
    full = attention(states, context)
    partial_saves = []
    for half in (0, 1):
        piece = copy.deepcopy(attention)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(piece, name).weight
            weight.data = weight.data.chunk(2)[half]
        piece.o_proj.weight.data = piece.o_proj.weight.data.chunk(2, dim=1)[half]
        piece.first_head = 2 * half
        partial_saves.append(piece(states, context))
    torch.testing.assert_close(sum(partial_saves), full)


def context_of(own: Decoder, states: Tensor) -> StepContext:
    """As a forward over `states` makes it."""
    contexts: list[StepContext] = []
    handle = own.model.layers["0"].register_forward_pre_hook(
        lambda _module, inputs: contexts.append(inputs[1])
    )
    own(tokens(*states.shape[:2]), sample_seeds=SEEDS)
    handle.remove()
    return contexts[0]


def test_half_the_residual_stream_is_dropped_as_the_full() -> None:
    own, _ = pair(dense_spec(type="LlamaConfig", hidden_dropout=0.3))
    states = torch.ones(2, 12, 64)
    context = context_of(own, states)
    layer = own.model.layers["1"]
    assert isinstance(layer, DecoderLayer)
    full = layer._dropped(states, context, ATTENTION_OUTPUT)
    for half in (0, 1):
        part = replace(context, stream_indices=torch.arange(12).chunk(2)[half])
        dropped = layer._dropped(states.chunk(2, dim=1)[half], part, ATTENTION_OUTPUT)
        assert torch.equal(dropped, full.chunk(2, dim=1)[half])


def test_a_stage_counts_the_full_length_of_a_stream_in_parts() -> None:
    """A later stage gets half of the tokens' states and makes tables and sight for all of them."""
    own, _ = pair(dense_spec(type="LlamaConfig"))
    own.embeds, own.ends, own.stream_part = False, False, (1, 2)
    contexts: list[StepContext] = []
    own.model.layers = torch.nn.ModuleDict({"0": Spy(contexts)})
    states = torch.randn(2, 6, 64)
    assert own(states) is states
    (context,) = contexts
    assert context.cos.shape[2] == context.mask.total == 12
    assert context.stream_indices is not None
    assert context.stream_indices.tolist() == list(range(6, 12))


class Spy(torch.nn.Module):
    def __init__(self, contexts: list[StepContext]) -> None:
        super().__init__()
        self.contexts = contexts

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        self.contexts.append(context)
        return states


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*EXPERTS, "qwen3"])
def test_stages_one_after_the_other_are_the_model(family: str, tied: bool) -> None:
    given = {"tie_word_embeddings": tied, **DROPOUT}
    spec = dense_spec(**MODELS["qwen3"], **given) if family == "qwen3" else (
        experts_spec(family, **given)
    )  # fmt: skip
    own, _ = pair(spec)
    first, last = copy.deepcopy(own), copy.deepcopy(own)
    del first.model.layers["1"], first.model.layers["2"], first.model.norm, last.model.layers["0"]
    first.ends, last.embeds = False, False
    input_ids = tokens(2, 12)
    between = first(input_ids, sample_seeds=SEEDS)
    assert not between._is_view()
    logits = last(between, sample_seeds=SEEDS)
    assert torch.equal(logits, own(input_ids, sample_seeds=SEEDS))
    full, names = dict(own.named_parameters()), dict(last.named_parameters())
    assert set(names) < set(full)
    assert "model.layers.2.input_layernorm.weight" in names


LEAVES = {
    "latent": lambda: experts_spec("deepseek_v3", n_shared_experts=1),
    "experts": lambda: experts_spec("qwen3_moe", attention_bias=True),
    "tied": lambda: dense_spec(type="LlamaConfig", tie_word_embeddings=True, mlp_bias=True),
}


@pytest.mark.parametrize("name", LEAVES)
def test_every_parameter_is_used_through_its_view(name: str) -> None:
    own, _ = pair(LEAVES[name]())
    used: set[str] = set()
    for leaf_name, leaf in own.named_modules():
        if isinstance(leaf, Leaf):
            held = [key for key in leaf._parameters if getattr(leaf, key) is not None]
            for key in held or ["weight"]:
                leaf.views[key] = lambda p, place=f"{leaf_name}.{key}": used.add(place) or p
    own(tokens(1, 8))
    expected = {parameter_name for parameter_name, _ in own.named_parameters()}
    expected |= {"tied_head.weight"} if own.tied_head is not None else set()
    assert used == expected


def test_a_tied_head_follows_its_embedding() -> None:
    own, _ = pair(dense_spec(type="LlamaConfig", tie_word_embeddings=True))
    head = own.head_module
    assert isinstance(head, TiedHead)
    assert not list(head.parameters())
    other = copy.deepcopy(own)
    other.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(96, 64))
    assert not other(tokens(1, 4)).any()
    assert own(tokens(1, 4)).any()
    head.views["weight"] = lambda weight: weight[:10]
    assert own(tokens(1, 4)).shape[-1] == 10


def test_a_cache_holds_values_of_another_size() -> None:
    cache = KVCache(capacity=2)
    keys, values = torch.randn(1, 2, 5, 12), torch.randn(1, 2, 5, 7)
    for part in (slice(0, 1), slice(1, 5)):
        found = cache.append(0, keys[:, :, part], values[:, :, part])
        cache.advance(part.stop - part.start)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
