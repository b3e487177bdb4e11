"""Legacy names of TeleChat2, whose Hugging Face names are those of its own code."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.mindspore.naming import fused, stacks
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.llama import KINDS, NORMS, dense, expert_names, experts
from launcher.mindspore.naming.rule import Rule, same
from launcher.mindspore.naming.sizes import Sizes

ENDS = (
    same("model.tok_embeddings.embedding_weight", "transformer.word_embeddings.weight"),
    same("model.norm_out.weight", "transformer.ln_f.weight"),
    same("lm_head.weight", "lm_head.weight"),
)


def rules(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    """All rules of a model."""
    yield from ENDS
    for layer in range(sizes.layers):
        for rule in (*NORMS, *_attention(orders), *dense("feed_forward.", "mlp.", orders),
                     *_experts(sizes, orders)):  # fmt: skip
            yield rule.below(f"model.layers.{layer}.", f"transformer.h.{layer}.")


def _attention(orders: Orders) -> Iterator[Rule]:
    for kind in KINDS:
        query, both = (f"self_attention.{name}.{kind}" for name in ("query", "key_value"))
        yield same(f"attention.wo.{kind}", f"self_attention.dense.{kind}")
        yield same(f"attention.wq.{kind}", query, "separate qkv")
        yield same(f"attention.wk_v.{kind}", both, "separate qkv")
        yield Rule(f"attention.w_qkv.{kind}", (query, both),
                   fused.query_with_pairs(orders.blocks), "fused qkv")  # fmt: skip


def _experts(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    yield same("feed_forward.router.dense.weight", "mlp.router.weight")
    place = "mlp.local_experts."
    yield from experts("feed_forward.ffn.", expert_names(place, sizes), orders)
    biases = tuple(f"{place}{expert}.down_proj.bias" for expert in range(sizes.experts))
    yield Rule("feed_forward.ffn.w2.bias", biases, stacks.vectors())
