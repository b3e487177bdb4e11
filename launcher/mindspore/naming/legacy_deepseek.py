"""Legacy names of DeepSeek-V3. Its network rotates halves: rotary rows are stored even ones first.

Prediction layers keep their numbers; what is special to them has names of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.mindspore.naming import split, stacks
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.llama import (
    ENDS,
    NORMS,
    PROJECTIONS,
    alternating,
    expert_names,
)
from launcher.mindspore.naming.rule import Rule, same
from launcher.mindspore.naming.sizes import Sizes


def rules(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    """All rules of a model."""
    for rule in ENDS:
        yield same(rule.mf, rule.hf[0], is_float32="norm" in rule.mf)
    for layer in range(sizes.layers + sizes.prediction_layers):
        place = f"model.layers.{layer}."
        for rule in (*_norms(), *_attention(), *_mlp(sizes)):
            yield rule.below(place, place)
    for number in range(sizes.prediction_layers):
        hf, mf = f"model.layers.{sizes.layers + number}.", f"model.mtp_hidden_fusers.{number}."
        yield same(f"{mf}norm_emb.weight", f"{hf}enorm.weight", is_float32=True)
        yield same(f"{mf}norm.weight", f"{hf}hnorm.weight", is_float32=True)
        yield same(f"{mf}dense.weight", f"{hf}eh_proj.weight")
        yield same(f"model.mtp_norms.{number}.weight", f"{hf}shared_head.norm.weight",
                   is_float32=True)  # fmt: skip


def _norms() -> Iterator[Rule]:
    for rule in NORMS:
        yield same(rule.mf, rule.hf[0], is_float32=True)


def _head(sizes: Sizes) -> int:
    return sizes.plain_size + sizes.rotary_size


def _attention() -> Iterator[Rule]:
    yield same("attention.wo.weight", "self_attn.o_proj.weight")
    query = "self_attn.q_b_proj.weight"
    yield same("attention.q2l_proj.weight", "self_attn.q_a_proj.weight")
    yield same("attention.lq_norm.weight", "self_attn.q_a_layernorm.weight", is_float32=True)
    yield same("attention.lkv_norm.weight", "self_attn.kv_a_layernorm.weight", is_float32=True)
    plain = split.part_of_heads(_zero, lambda s: s.plain_size, _head)
    rotary = split.rotary_of_heads(lambda s: s.plain_size, lambda s: s.rotary_size, _head)
    yield Rule("attention.l2q_nope_proj.weight", (query,), plain)
    yield Rule("attention.l2q_pe_proj.weight", (query,), rotary)
    latent, up = "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight"
    rank, rotary_size = (lambda s: s.key_value_rank), (lambda s: s.rotary_size)
    down = lambda s: s.key_value_rank + s.rotary_size  # noqa: E731
    pair = lambda s: s.plain_size + s.value_size  # noqa: E731
    for name, hf, geometry in (
        ("kv2l_latent_kv", latent, split.part_of_rows(_zero, rank, down)),
        ("kv2l_k_pe", latent, split.rotary_of_heads(rank, rotary_size, down)),
        ("lkv2kv_k_nope", up, split.part_of_heads(_zero, lambda s: s.plain_size, pair)),
        ("lkv2kv_v", up, split.part_of_heads(lambda s: s.plain_size, lambda s: s.value_size, pair)),
    ):
        yield Rule(f"attention.{name}.weight", (hf,), geometry)


def _zero(sizes: Sizes) -> int:
    return 0


def _mlp(sizes: Sizes) -> Iterator[Rule]:
    for place in ("", "shared_experts."):
        mf, hf = f"feed_forward.{place}", f"mlp.{place}"
        for number, name in enumerate(PROJECTIONS, 1):
            yield same(f"{mf}w{number}.weight", f"{hf}{name}.weight")
    routed = "feed_forward.routed_experts."
    for form, router, bias in (
        ("grouped", "router_dense.weight", "topk_bias"),
        ("batched", "router.dense.weight", "router.router.topk_bias"),
    ):
        yield same(routed + router, "mlp.gate.weight", form, is_float32=True)
        yield same(routed + bias, "mlp.gate.e_score_correction_bias", form, is_float32=True)
    gate, down, up = expert_names("mlp.experts.", sizes)
    both = alternating(gate, up)
    yield Rule(f"{routed}ffn.w1", both, stacks.gate_up_columns("three dims"), "grouped")
    yield Rule(f"{routed}ffn.w2", down, stacks.down_columns("three dims"), "grouped")
    for number, names in enumerate((gate, down, up), 1):
        yield Rule(f"{routed}ffn.w{number}.weight", names, stacks.stacked(), "batched")
