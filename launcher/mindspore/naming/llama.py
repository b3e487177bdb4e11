"""Legacy names of models in the form of Llama: Llama 2 and 3, Qwen2, Mixtral, Qwen2-MoE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from launcher.mindspore.naming import fused, stacks
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.rule import Rule, same
from launcher.mindspore.naming.sizes import Sizes

ENDS = (
    same("model.tok_embeddings.embedding_weight", "model.embed_tokens.weight"),
    same("model.norm_out.weight", "model.norm.weight"),
    same("lm_head.weight", "lm_head.weight"),
)
NORMS = (
    same("attention_norm.weight", "input_layernorm.weight"),
    same("ffn_norm.weight", "post_attention_layernorm.weight"),
)
KINDS = ("weight", "bias")
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")
"""Of an MLP, in the order of w1, w2, w3."""


def rules(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    """All rules of a model."""
    yield from ENDS
    for layer in range(sizes.layers):
        place = f"model.layers.{layer}."
        for rule in (*NORMS, *_attention(orders), *_mlp(sizes, orders)):
            yield rule.below(place, place)


def _attention(orders: Orders) -> Iterator[Rule]:
    for kind in KINDS:
        of = {letter: f"self_attn.{letter}_proj.{kind}" for letter in "qkvo"}
        yield same(f"attention.wo.{kind}", of["o"])
        for letter in "qkv":
            yield same(f"attention.w{letter}.{kind}", of[letter], "separate qkv")
        yield Rule(f"attention.w_qkv.{kind}", (of["q"], of["k"], of["v"]),
                   fused.qkv(orders.qkv, orders.blocks), "fused qkv")  # fmt: skip


def _mlp(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    if sizes.family == "mixtral":
        yield same("feed_forward.router.dense.weight", "block_sparse_moe.gate.weight")
        place, every = "block_sparse_moe.experts.", range(sizes.experts)
        names = [tuple(f"{place}{expert}.w{n}.weight" for expert in every) for n in (1, 2, 3)]
        yield from experts("feed_forward.ffn.", names, orders)
        return
    if sizes.family == "qwen2_moe":
        yield from _qwen2_moe(sizes, orders)
    yield from dense("feed_forward.", "mlp.", orders)


def dense(mf: str, hf: str, orders: Orders) -> Iterator[Rule]:
    """An MLP, with gate and up separate or fused."""
    for kind in KINDS:
        gate, down, up = (f"{hf}{name}.{kind}" for name in PROJECTIONS)
        yield same(f"{mf}w2.{kind}", down)
        yield same(f"{mf}w1.{kind}", gate, "separate mlp")
        yield same(f"{mf}w3.{kind}", up, "separate mlp")
        yield Rule(f"{mf}w_gate_hidden.{kind}", (gate, up),
                   fused.gate_up(orders.mlp, orders.blocks), "fused mlp")  # fmt: skip


def experts(mf: str, hf: Iterable[tuple[str, ...]], orders: Orders) -> Iterator[Rule]:
    """Stacks of the experts of a layer. `hf`: for each of w1, w2, w3 the names of all experts."""
    geometry = stacks.transposed() if orders.gmm else stacks.stacked()
    for number, names in enumerate(hf, 1):
        yield Rule(f"{mf}w{number}.weight", names, geometry)


def expert_names(place: str, sizes: Sizes) -> list[tuple[str, ...]]:
    """The names of all experts in Hugging Face files, for each of `PROJECTIONS`."""
    return [
        tuple(f"{place}{expert}.{name}.weight" for expert in range(sizes.experts))
        for name in PROJECTIONS
    ]


def alternating(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """Names of two lists in turn."""
    return tuple(name for pair in zip(first, second, strict=True) for name in pair)


def _qwen2_moe(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    place = "feed_forward."
    yield same(f"{place}routed_experts.router.dense.weight", "mlp.gate.weight")
    yield same(f"{place}shared_experts_gate.weight", "mlp.shared_expert_gate.weight")
    names = expert_names("mlp.experts.", sizes)
    yield from experts(f"{place}routed_experts.ffn.", names, orders)
    # w2 is up and w3 is down here, unlike everywhere else.
    for number, name in enumerate(("gate_proj", "up_proj", "down_proj"), 1):
        yield same(f"{place}shared_experts.w{number}.weight", f"mlp.shared_expert.{name}.weight")
