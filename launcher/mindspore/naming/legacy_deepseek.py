"""Legacy names of DeepSeek-V3. Its network rotates halves: rotary rows are stored even ones first.

Prediction layers keep their numbers; what is special to them has names of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.mindspore.naming import split, stacks
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.llama import ENDS, NORMS, PROJECTIONS
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
    latent, both = "self_attn.kv_a_proj_with_mqa.weight", lambda s: s.key_value_rank + s.rotary_size
    yield Rule("attention.kv2l_latent_kv.weight", (latent,),
               split.part_of_rows(_zero, lambda s: s.key_value_rank, both))  # fmt: skip
    yield Rule("attention.kv2l_k_pe.weight", (latent,),
               split.rotary_of_heads(lambda s: s.key_value_rank, lambda s: s.rotary_size, both))  # fmt: skip
    up, pair = "self_attn.kv_b_proj.weight", lambda s: s.plain_size + s.value_size
    yield Rule("attention.lkv2kv_k_nope.weight", (up,),
               split.part_of_heads(_zero, lambda s: s.plain_size, pair))  # fmt: skip
    yield Rule("attention.lkv2kv_v.weight", (up,),
               split.part_of_heads(lambda s: s.plain_size, lambda s: s.value_size, pair))  # fmt: skip


def _zero(sizes: Sizes) -> int:
    return 0


def _mlp(sizes: Sizes) -> Iterator[Rule]:
    for mf, hf in (("feed_forward.", "mlp."), ("feed_forward.shared_experts.", "mlp.shared_experts.")):
        for number, name in enumerate(PROJECTIONS, 1):
            yield same(f"{mf}w{number}.weight", f"{hf}{name}.weight")
    routed = "feed_forward.routed_experts."
    for form, router, bias in (("grouped", "router_dense.weight", "topk_bias"),
                               ("batched", "router.dense.weight", "router.router.topk_bias")):  # fmt: skip
        yield same(routed + router, "mlp.gate.weight", form, is_float32=True)
        yield same(routed + bias, "mlp.gate.e_score_correction_bias", form, is_float32=True)
    every = range(sizes.experts)
    gate, down, up = (tuple(f"mlp.experts.{e}.{name}.weight" for e in every) for name in PROJECTIONS)
    alternating = tuple(name for pair in zip(gate, up, strict=True) for name in pair)
    yield Rule(f"{routed}ffn.w1", alternating, stacks.gate_up_columns("three dims"), "grouped")
    yield Rule(f"{routed}ffn.w2", down, stacks.down_columns("three dims"), "grouped")
    for number, names in enumerate((gate, down, up), 1):
        yield Rule(f"{routed}ffn.w{number}.weight", names, stacks.stacked(), "batched")
