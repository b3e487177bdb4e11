"""Core names (`use_legacy: False`): Qwen3, Qwen3-MoE, DeepSeek-V3, and other dense models.

Routed experts are transposed, with gate before up whatever the order of other MLPs. Latent
attention has three forms: separate projections, query and key/value parts concatenated, and (in
earlier versions) split by kind of head rows; rotary rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.mindspore.naming import fused, split, stacks
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.llama import KINDS, PROJECTIONS, alternating, expert_names
from launcher.mindspore.naming.rule import Rule, same
from launcher.mindspore.naming.sizes import Sizes

ENDS = (
    same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    same("decoder.final_layernorm.weight", "model.norm.weight"),
    same("output_layer.weight", "lm_head.weight"),
)
NORMS = (
    same("input_layernorm.weight", "input_layernorm.weight"),
    same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
_OWN = "self_attention."


def rules(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    """All rules of a model."""
    yield from ENDS
    attention = [*(_latent(sizes) if sizes.key_value_rank else _attention(orders))]
    layer = [*NORMS, *attention, *_mlp(orders), *(_experts(sizes, orders) if sizes.experts else ())]
    for number in range(sizes.layers):
        for rule in layer:
            yield rule.below(f"decoder.layers.{number}.", f"model.layers.{number}.")
    for number in range(sizes.prediction_layers):
        mf, hf = f"mtp.layers.{number}.", f"model.layers.{sizes.layers + number}."
        for rule in layer:
            yield rule.below(f"{mf}transformer_layer.", hf)
        for name in ("enorm", "hnorm", "eh_proj"):
            yield same(f"{mf}{name}.weight", f"{hf}{name}.weight")
        yield same(f"{mf}final_layernorm.weight", f"{hf}shared_head.norm.weight")


def _attention(orders: Orders) -> Iterator[Rule]:
    for kind in KINDS:
        names = tuple(f"self_attn.{letter}_proj.{kind}" for letter in "qkv")
        yield Rule(f"{_OWN}linear_qkv.{kind}", names, fused.qkv(orders.qkv, orders.blocks))
        yield same(f"{_OWN}linear_proj.{kind}", f"self_attn.o_proj.{kind}")
    for letter in "qk":
        yield same(f"{_OWN}{letter}_layernorm.weight", f"self_attn.{letter}_norm.weight")


def _latent(sizes: Sizes) -> Iterator[Rule]:
    query, down, up = (
        f"self_attn.{name}.weight"
        for name in ("q_a_proj" if sizes.query_rank else "q_proj", "kv_a_proj_with_mqa",
                     "kv_b_proj")
    )  # fmt: skip
    yield same(f"{_OWN}linear_proj.weight", "self_attn.o_proj.weight")
    for name, form in (("kv_layernorm", "separate latent"), ("k_layernorm", "joined latent")):
        yield same(f"{_OWN}{name}.weight", "self_attn.kv_a_layernorm.weight", form)
    query_name = "q_down" if sizes.query_rank else "q"
    for name, hf in ((query_name, query), ("kv_down", down), ("kv_up", up)):
        yield same(f"{_OWN}linear_{name}_proj.weight", hf, "separate latent")
    both = split.concatenated(_first_query_rows, lambda s: s.key_value_rank + s.rotary_size)
    yield Rule(f"{_OWN}linear_qkv.weight", (query, down), both, "joined latent")
    yield same(f"{_OWN}linear_kvb.weight", up, "joined latent")
    if sizes.query_rank:
        query_up = "self_attn.q_b_proj.weight"
        yield same(f"{_OWN}q_layernorm.weight", "self_attn.q_a_layernorm.weight")
        yield same(f"{_OWN}linear_q_up_proj.weight", query_up, "separate latent")
        yield same(f"{_OWN}linear_qb.weight", query_up, "joined latent")
        yield from _by_kind(query_up, up)


def _first_query_rows(sizes: Sizes) -> int:
    """Rows of the projection of the hidden state to queries: low-rank ones, or all of them."""
    return sizes.query_rank or sizes.heads * (sizes.plain_size + sizes.rotary_size)


def _by_kind(query_up: str, up: str) -> Iterator[Rule]:
    """The rows of each kind in a matrix of their own."""
    query, pair = lambda s: s.plain_size + s.rotary_size, lambda s: s.plain_size + s.value_size
    for name, hf, geometry in (
        ("qk_nope", query_up, split.part_of_heads(lambda s: 0, lambda s: s.plain_size, query)),
        ("qk_rope", query_up,
         split.part_of_heads(lambda s: s.plain_size, lambda s: s.rotary_size, query)),
        ("kv_nope", up, split.part_of_heads(lambda s: 0, lambda s: s.plain_size, pair)),
        ("v", up, split.part_of_heads(lambda s: s.plain_size, lambda s: s.value_size, pair)),
    ):  # fmt: skip
        yield Rule(f"{_OWN}linear_{name}.weight", (hf,), geometry, "latent by kind")


def _mlp(orders: Orders) -> Iterator[Rule]:
    for mf, hf in (("mlp.", "mlp."), ("mlp.shared_experts.", "mlp.shared_experts.")):
        for kind in KINDS:
            gate, down, up = (f"{hf}{name}.{kind}" for name in PROJECTIONS)
            geometry = fused.gate_up(orders.mlp, orders.blocks)
            yield Rule(f"{mf}linear_fc1.{kind}", (gate, up), geometry)
            yield same(f"{mf}linear_fc2.{kind}", down)


def _experts(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    yield same("mlp.router.weight", "mlp.gate.weight")
    for name, form in (("mlp.router.expert_bias", "graph"), ("mlp.expert_bias", "eager")):
        yield same(name, "mlp.gate.e_score_correction_bias", form, is_float32=True)
    gate, down, up = expert_names("mlp.experts.", sizes)
    both = alternating(gate, up)
    for name, form in (("weight", "weight1"), ("w", "w1")):
        yield Rule(f"mlp.experts.{name}1", both, stacks.gate_up_columns(orders.experts), form)
        yield Rule(f"mlp.experts.{name}2", down, stacks.down_columns(orders.experts), form)
