"""A source under Hugging Face names as one under the names of MindFormers, to be written.

Owns which naming and which forms weights get. Rows that alternate are no boxes of a matrix, but
they are boxes of a view of it: [2F, H] is written as [F, 2, H], the same bytes. So a tensor here
has the shape of the view, and `Source.written` the shape that files declare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.mindspore.naming import orders as keys
from launcher.mindspore.naming.choices import Orders
from launcher.mindspore.naming.geometry import Link, inverse
from launcher.mindspore.naming.rule import Rule
from launcher.mindspore.naming.sizes import Sizes, sizes_of
from launcher.mindspore.naming.tables import NAMINGS, WRITTEN, families_of, written_table
from launcher.weights.foreign_names import Named
from launcher.weights.geometry import moved
from launcher.weights.log import Log
from launcher.weights.optimizer_state import STATE_PREFIXES, is_optimizer_state
from launcher.weights.pieces import Pieces
from launcher.weights.source import Source, Written
from launcher.weights.translated import Translated

FORMS = {
    "legacy": {"", "mindformers"},
    "mcore": {"", "separate latent", "graph", "weight1"},
    "mcore_1.6": {"", "joined latent", "graph", "weight1"},
}
"""Naming to the forms of it that are written."""
CORE_FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")
"""Families that are written under core names by default; all others under legacy names."""
NAMED = 4

_EXPERT = re.compile(r"\.local_experts\.(\d{1,6})\.")
_NOT_WRITTEN = re.compile(r"rotary_emb\.inv_freq$|\.rotary_pos_emb\.inv_freq$")
"""Buffers of old files that MindFormers has no parameter for."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How weights are written."""

    naming: str | None = None
    """A key of `FORMS`; None: that of the family."""
    is_fused: bool = False
    """Whether query, key, value and gate, up are one matrix each under legacy names
    (`qkv_concat`)."""
    qkv: str | None = None
    mlp: str | None = None
    """Orders of fused rows; None: those that the naming has by default."""
    orders: Orders = field(default_factory=Orders)
    """The other orders."""
    is_required: bool = True
    """Whether it is an error when MindFormers has no names for the model; else names are kept."""


def options_from(given: Mapping[str, Any]) -> WriteOptions:
    """The options in `given`: `naming`, `qkv_concat`, `required`, and the keys of a
    configuration."""
    orders = Orders(
        blocks=given.get(keys.BLOCKS) or 1,
        gmm=bool(given.get(keys.GMM)),
        rearranged=bool(given.get(keys.ROPE)),
    )
    return WriteOptions(
        qkv=given.get(keys.QKV), mlp=given.get(keys.MLP), naming=given.get("naming"),
        is_fused=bool(given.get("qkv_concat")), orders=orders,
        is_required=bool(given.get("required", True)),
    )  # fmt: skip


def as_written(
    source: Source, config: Mapping[str, Any], given: Mapping[str, Any], log: Log
) -> Named:
    """`source` under names of MindFormers, and the metadata that names the orders of its files.

    `config`: the content of config.json. Raises `UserError` for a model without such names, unless
    they are not required, and for tensors that have none.
    """
    options = options_from(given)
    if any(naming.keys.match(name) for naming in NAMINGS[:3] for name in source.tensors):
        log(f"{source.path} has names of MindFormers, which are kept")
        return Named(source)
    family = str(config.get("model_type", ""))
    naming = options.naming or ("mcore" if family in CORE_FAMILIES else "legacy")
    table = written_table(naming, family)
    if table is None:
        if options.is_required:
            raise _no_names(source, family, naming)
        log(f"{family or 'this model'} has no {naming} names of MindFormers: names are kept")
        return Named(source)
    _check_plain(source)
    sizes, orders = _sizes(config, source), _orders_of(options, naming, family)
    forms = FORMS[naming] | ({"grouped"} if orders.gmm else {"batched"})
    forms |= {f"{'fused' if options.is_fused else 'separate'} {part}" for part in ("qkv", "mlp")}
    rules = [rule for rule in table(sizes, orders) if rule.form in forms]
    chosen, used = _chosen(source, rules)
    _check_used(source, used, sizes, naming)
    shapes = {name: _shape(rule, prefix, source, sizes) for name, (prefix, rule) in chosen.items()}
    make = lambda name: _pieces(*chosen[name], source, sizes)  # noqa: E731
    written = {name: Written(shape, "F32" if chosen[name][1].is_float32 else None)
               for name, shape in shapes.items()}  # fmt: skip
    log(f"written under {naming} names of MindFormers")
    named = replace(source, tensors=Translated(make, chosen, {}), written=written, promised={})
    return Named(named, _metadata([rule for _, rule in chosen.values()], orders))


def _sizes(config: Mapping[str, Any], source: Source) -> Sizes:
    """The sizes in config.json, with the experts that the files have where it has none."""
    sizes = sizes_of(config)
    if sizes.experts:
        return sizes
    numbers = [int(found[1]) for found in map(_EXPERT.search, source.tensors) if found]
    return replace(sizes, experts=max(numbers) + 1) if numbers else sizes


def _no_names(source: Source, family: str, naming: str) -> UserError:
    others = [other for other in WRITTEN if written_table(other, family)]
    return UserError(
        f"{source.path}: model_type {family!r} has no {naming} names in MindFormers",
        rule=f"{naming} names exist for {', '.join(families_of(naming))}",
        nearest=f"Nearest: --naming {others[0]}" if others else "",
        advice="Convert another model, or keep the Hugging Face names, which MindFormers reads too",
    )


def _orders_of(options: WriteOptions, naming: str, family: str) -> Orders:
    """The orders that files get: those that were asked for, or the usual ones."""
    orders = options.orders
    if family in ("telechat", "glm", "chatglm"):
        return replace(orders, qkv="plain", mlp="plain")
    if naming == "mcore_1.6":
        return replace(orders, qkv=options.qkv or "plain", mlp="plain", experts="earlier")
    return replace(orders, qkv=options.qkv or "group", mlp=options.mlp or "pair")


def _chosen(source: Source, rules: list[Rule]) -> tuple[dict[str, tuple[str, Rule]], set[str]]:
    """(name in new files to the prefix of optimizer state and the rule; names of `source` that
    they use). Raises `UserError` where a rule lacks some of its tensors."""
    chosen, used = dict[str, tuple[str, Rule]](), set[str]()
    for prefix in ("", *STATE_PREFIXES):
        for rule in rules:
            names = [prefix + name for name in rule.hf]
            held = [name for name in names if name in source.tensors]
            if held and len(held) < len(names):
                missing = next(name for name in names if name not in source.tensors)
                raise UserError(
                    f"{source.path} lacks `{missing}`",
                    rule=f"`{prefix}{rule.mf}` is made of it and of `{held[0]}`",
                    advice="Copy the missing file, or give other weights",
                )
            if held:
                chosen[prefix + rule.mf] = (prefix, rule)
                used.update(held)
    return chosen, used


def _check_used(source: Source, used: set[str], sizes: Sizes, naming: str) -> None:
    """Check that nothing of the model is left. Raises `UserError`."""
    copies = tuple(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(sizes.layers, sizes.layers + sizes.prediction_layers)
        for name in ("embed_tokens", "shared_head.head")
    )
    rest = [
        name for name in source.tensors
        if name not in used and name not in copies and not _NOT_WRITTEN.search(name)
        and not is_optimizer_state(name)
    ]  # fmt: skip
    if rest:
        more = f" and {len(rest) - NAMED} more" * (len(rest) > NAMED)
        raise UserError(
            f"{', '.join(f'`{name}`' for name in rest[:NAMED])}{more} cannot be named",
            where=str(source.path),
            rule=f"{naming} names of MindFormers exist for the tensors of {sizes.family} with "
            f"{sizes.layers} layers" + (f", {sizes.experts} experts" if sizes.experts else ""),
            advice="Give the config.json of these weights",
        )


def _check_plain(source: Source) -> None:
    if source.scales:
        raise UserError(
            f"{source.path} holds FP8 weights, such as `{next(iter(source.scales))}`",
            rule="MindFormers has no place for their block scales",
            advice="Give weights in bfloat16",
        )


def _all_links(rule: Rule, prefix: str, source: Source, sizes: Sizes) -> list[list[Link]]:
    """For each Hugging Face tensor of a rule what it shares. Raises `UserError` for shapes that do
    not fit."""
    empty = next((hf for hf in rule.hf if not math.prod(source.shape(prefix + hf))), None)
    if empty is not None:
        raise _unfit(empty, source.shape(prefix + empty), source, "it has no elements")
    shapes = [source.shape(prefix + hf) for hf in rule.hf]
    try:
        shape = rule.geometry.joined(sizes, shapes)
        links = [rule.geometry.links(sizes, shape, number) for number in range(len(rule.hf))]
    except (ValueError, IndexError) as error:
        raise _unfit(rule.hf[0], shapes[0], source, str(error)) from error
    for hf, found, given in zip(rule.hf, links, shapes, strict=True):
        for one in found:
            if one.hf.shape != given:
                raise _unfit(hf, given, source, f"{list(one.hf.shape)} is needed")
    return links


def _unfit(name: str, shape: Shape, source: Source, why: str) -> UserError:
    return UserError(
        f"`{name}` has shape {list(shape)}: {why}",
        where=str(source.path),
        rule="shapes must be those of config.json",
        advice="Give the config.json of these weights",
    )


def _shape(rule: Rule, prefix: str, source: Source, sizes: Sizes) -> Shape:
    """The shape that a new tensor declares. Raises `UserError` for shapes or dtypes that do not
    fit."""
    _all_links(rule, prefix, source, sizes)
    dtypes = {source.dtype(prefix + hf): hf for hf in rule.hf}
    if len(dtypes) > 1:
        (first, one), (second, other), *_ = dtypes.items()
        raise UserError(
            f"`{one}` is {first}, `{other}` is {second}",
            where=str(source.path),
            rule=f"they become one tensor, `{rule.mf}`",
            advice="Give weights of one dtype",
        )
    return rule.geometry.joined(sizes, [source.shape(prefix + hf) for hf in rule.hf])


def _pieces(prefix: str, rule: Rule, source: Source, sizes: Sizes) -> Pieces:
    """The pieces of a new tensor, as boxes of its view."""
    pieces = []
    for hf, found in zip(rule.hf, _all_links(rule, prefix, source, sizes), strict=True):
        for one in found:
            pieces += moved(source.tensors[prefix + hf], one.hf, one.mf.as_view(),
                            inverse(one.axes))  # fmt: skip
    return Pieces(pieces)


def _metadata(rules: list[Rule], orders: Orders) -> dict[str, str]:
    """Metadata of files about the orders of the rows in the tensors of `rules`."""
    names = [rule.mf.rpartition(".")[0] for rule in rules]
    found = {}
    if any(name.endswith(("w_qkv", "linear_qkv")) for name in names):
        found[keys.QKV] = orders.qkv
    if any(name.endswith(("w_gate_hidden", "linear_fc1")) for name in names):
        found[keys.MLP] = orders.mlp
    if "plain" in found.values():
        found[keys.BLOCKS] = str(orders.blocks)
    if any(name.endswith("ffn.w1") for name in names):
        found[keys.GMM] = str(orders.gmm)
    return found | ({keys.ROPE: "True"} if orders.rearranged else {})
