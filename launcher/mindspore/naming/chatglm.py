"""Names of GLM-4-9B: those of its own code (`chatglm`), of which MindFormers changes a few, and
those of the class `glm` of transformers.

Query, key and value are in one matrix in the former, gate and up in both.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.mindspore.naming import fused, split
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.llama import KINDS
from launcher.mindspore.naming.rule import SAME, Geometry, Rows, Rule, by_rows, per, same
from launcher.mindspore.naming.sizes import Sizes

FREQUENCIES = "transformer.rotary_pos_emb.inv_freq"
_EMBEDDINGS = ("transformer.embedding.embedding_weight",
               "transformer.embedding.word_embeddings.weight")  # fmt: skip
"""In MindFormers, and in the model's own code."""


def rules(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    """All rules of a model whose own files have the names of its own code."""
    yield same(*_EMBEDDINGS)
    for name in ("encoder.final_layernorm.weight", "output_layer.weight",
                 "rotary_pos_emb.inv_freq"):  # fmt: skip
        yield same(f"transformer.{name}", f"transformer.{name}")
    for layer in range(sizes.layers):
        place = f"transformer.encoder.layers.{layer}."
        for rule in (*_unchanged(), *_split(orders)):
            yield rule.below(place, place)


def glm_rules(sizes: Sizes, orders: Orders) -> Iterator[Rule]:
    """All rules of a model whose files have the names of the class `glm` of transformers."""
    for name, form in zip(_EMBEDDINGS, ("mindformers", "own code"), strict=True):
        yield same(name, "model.embed_tokens.weight", form)
    yield same("transformer.encoder.final_layernorm.weight", "model.norm.weight")
    yield same("transformer.output_layer.weight", "lm_head.weight")
    for layer in range(sizes.layers):
        for rule in _glm_layer(orders):
            yield rule.below(f"transformer.encoder.layers.{layer}.", f"model.layers.{layer}.")


def _unchanged() -> Iterator[Rule]:
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield same(name, name)
    for kind in KINDS:
        for name in (f"self_attention.dense.{kind}", f"mlp.dense_4h_to_h.{kind}"):
            yield same(name, name)


def _split(orders: Orders) -> Iterator[Rule]:
    for kind in KINDS:
        rows_of_all = f"self_attention.query_key_value.{kind}"
        yield same(rows_of_all, rows_of_all, "fused qkv")
        for number, letter in enumerate("qkv"):
            yield Rule(f"self_attention.w{letter}.{kind}", (rows_of_all,), _heads(number, orders),
                       "separate qkv")  # fmt: skip
        both = f"mlp.dense_h_to_4h.{kind}"
        yield same(both, both, "fused mlp")
        for number, side in enumerate(("left", "right")):
            yield Rule(f"mlp.dense_{side}.{kind}", (both,), _half(number), "separate mlp")


def _heads(number: int, orders: Orders) -> Geometry:
    """Rows of query, key or value (0, 1, 2) of the plain query, key, value."""
    is_swapped = orders.rearranged and number < 2

    def pairs(sizes: Sizes, rows: int) -> list[list[tuple[Rows, Rows]]]:
        counts = (sizes.heads, sizes.groups, sizes.groups)
        heads, start = counts[number], sum(counts[:number])
        size = per(rows, heads, "the heads")
        rows_of_all = Rows(sum(counts), size)
        if not is_swapped:
            return [[(rows_of_all[start : start + heads, :], Rows(heads, size))]]
        return [_swapped(rows_of_all[start : start + heads, :], heads, size, start)]

    def count(sizes: Sizes, rows: int) -> int:
        heads = (sizes.heads, sizes.groups, sizes.groups)
        return per(rows, sum(heads), "the heads") * heads[number]

    return by_rows(pairs, lambda sizes, rows: count(sizes, rows[0]))


def _swapped(rows_of_all: Rows, heads: int, size: int, start: int) -> list[tuple[Rows, Rows]]:
    """Heads of `rows_of_all` from `start` on, whose even rows are stored before the odd ones."""
    half, stored = per(size, 2, "a pair of rows"), Rows(heads, size)
    every = slice(start, start + heads)
    return [
        (rows_of_all[every, 0:size:2], stored[:, :half]),
        (rows_of_all[every, 1:size:2], stored[:, half:]),
    ]


def _half(number: int) -> Geometry:
    def pairs(sizes: Sizes, rows: int) -> list[list[tuple[Rows, Rows]]]:
        return [[(Rows(2 * rows)[number * rows : (number + 1) * rows], Rows(rows))]]

    return by_rows(pairs, lambda sizes, rows: per(rows[0], 2, "gate and up"))


def _glm_layer(orders: Orders) -> Iterator[Rule]:
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield same(name, name)
    rearranged = split.rotary_of_heads(lambda s: 0, lambda s: s.head_size, lambda s: s.head_size)
    for kind in KINDS:
        yield same(f"self_attention.dense.{kind}", f"self_attn.o_proj.{kind}")
        yield same(f"mlp.dense_4h_to_h.{kind}", f"mlp.down_proj.{kind}")
        names = tuple(f"self_attn.{letter}_proj.{kind}" for letter in "qkv")
        yield Rule(f"self_attention.query_key_value.{kind}", names, fused.qkv("plain"), "fused qkv")
        for letter, name in zip("qkv", names, strict=True):
            geometry = rearranged if orders.rearranged and letter != "v" else SAME
            yield Rule(f"self_attention.w{letter}.{kind}", (name,), geometry, "separate qkv")
        both = f"mlp.gate_up_proj.{kind}"
        yield same(f"mlp.dense_h_to_4h.{kind}", both, "fused mlp")
        for number, side in enumerate(("left", "right")):
            yield Rule(f"mlp.dense_{side}.{kind}", (both,), _half(number), "separate mlp")
