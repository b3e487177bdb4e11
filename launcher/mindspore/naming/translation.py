"""A source under the names of MindFormers as a source under Hugging Face names.

Owns the way from the tensors in the files to those of the model: nothing is read or copied, every
tensor becomes boxes of others, and is looked up when it is needed. Optimizer state follows the rule
of its parameter. Invariants: a tensor that is stored in several others is complete, or the error
names what is missing; names that no rule knows stay as they are, so that a load reports them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.mindspore.naming.choices import Options
from launcher.mindspore.naming.complete import check_complete
from launcher.mindspore.naming.geometry import Link, reshaped
from launcher.mindspore.naming.orders import Evidence, choose_orders, options_of
from launcher.mindspore.naming.rule import Rule
from launcher.mindspore.naming.sizes import Sizes, sizes_of
from launcher.mindspore.naming.state import sorted_in
from launcher.mindspore.naming.tables import Naming, naming_of
from launcher.weights.foreign_names import COMPLETE
from launcher.weights.geometry import moved
from launcher.weights.log import Log
from launcher.weights.pieces import Pieces
from launcher.weights.source import Source
from launcher.weights.translated import Translated

NAMED = 4

_PREDICTION = re.compile(r"(mtp\.|model\.mtp_(hidden_fusers|norms)\.)")
"""Parts of multi-token prediction in files."""
_NEVER_USED = ("mtp.output_layer.weight", "rotary_pos_emb.inv_freq")
"""A copy of the output layer, and a table of frequencies, that some converters write."""


@dataclass(frozen=True)
class Use:
    """One tensor in the files that another takes part of."""

    stored: str
    rule: Rule
    number: int
    """Of the Hugging Face tensor in the rule."""


def with_keys(
    source: Source, config: Mapping[str, Any] | None, keys: Mapping[str, Any], log: Log
) -> Source:
    """As `under_hugging_face_names`, with the keys of a configuration. Without a `config` names are
    kept."""
    if config is None:
        if (naming := naming_of(source.tensors)) is not None and naming.name != "chatglm":
            log(f"{source.path}: {naming.name} names of MindFormers are kept, as config.json of "
                "the model is not known (--config)")  # fmt: skip
        return source
    complete = bool(keys.get(COMPLETE))
    return under_hugging_face_names(source, config, options_of(keys), log, is_complete=complete)


def under_hugging_face_names(
    source: Source, config: Mapping[str, Any], options: Options, log: Log, *,
    is_complete: bool = False,
) -> Source:  # fmt: skip
    """`source` under Hugging Face names, where it has those of MindFormers; else `source` itself.

    `config`: the content of config.json. `is_complete`: check that it is all of a model and nothing
    else. Raises `UserError` for a model whose names are not known, for orders that cannot be known,
    and for tensors that are stored in part or twice.
    """
    found = sorted_in(source.tensors)
    parameters = {bare: name for name, (_, bare) in reversed(found.kept.items())}
    naming = naming_of(parameters)
    if naming is None:
        return source
    sizes = _with_experts(sizes_of(config), source, parameters)
    table = naming.tables.get(sizes.family)
    if table is None:
        if naming.name == "chatglm":
            return source
        raise _other_family(source, naming, sizes)
    _say(source, naming, found.left_out, log)
    orders = choose_orders(naming, sizes, Evidence(source, parameters), options, log)
    rules = {rule.mf: rule for rule in table(sizes, orders)}
    uses, rest = _uses(found.kept, rules)
    rest = _without_prediction(rest, sizes, log)
    _check(source, uses, rules)
    if is_complete:
        check_complete(source.path, uses, rest, sizes)
    make = lambda name: _pieces(name, uses[name], source, sizes)  # noqa: E731
    shared = _shared(uses, sizes)
    make_all = lambda name: make(shared.get(name, name))  # noqa: E731
    others = {name: source.tensors[name] for name in rest}
    return replace(source, tensors=Translated(make_all, [*uses, *shared], others))


def _with_experts(sizes: Sizes, source: Source, parameters: Mapping[str, str]) -> Sizes:
    """`sizes` with the experts that the files have, where config.json does not give their number
    (TeleChat2 has no class whose keys would be known)."""
    stack = next((name for bare, name in parameters.items() if bare.endswith(".ffn.w1.weight")), "")
    if sizes.experts or not stack:
        return sizes
    return replace(sizes, experts=source.shape(stack)[0])


def _say(source: Source, naming: Naming, left_out: list[str], log: Log) -> None:
    if naming.name != "chatglm":
        log(f"{source.path}: {naming.name} names of MindFormers")
    if left_out:
        more = " ..." * (len(left_out) > NAMED)
        log(f"left out, state of an optimizer that is not built here: "
            f"{', '.join(left_out[:NAMED])}{more}")  # fmt: skip


def _other_family(source: Source, naming: Naming, sizes: Sizes) -> UserError:
    return UserError(
        f"{source.path} has {naming.name} names of MindFormers, and the model is "
        f"{sizes.family or 'of no type'}",
        rule=f"model_type is one of {', '.join(sorted(naming.tables))} for such weights",
        advice="Give the Hugging Face weights of the model, or the config.json of these weights",
    )


def _uses(
    kept: Mapping[str, tuple[str, str]], rules: Mapping[str, Rule]
) -> tuple[dict[str, list[Use]], list[str]]:
    """(Hugging Face name to the tensors that hold parts of it, names without a rule)."""
    uses, rest = dict[str, list[Use]](), []
    for name, (prefix, bare) in kept.items():
        rule = rules.get(bare)
        if rule is None:
            rest.append(name)
            continue
        for number, hf in enumerate(rule.hf):
            uses.setdefault(prefix + hf, []).append(Use(name, rule, number))
    return uses, rest


def _without_prediction(rest: list[str], sizes: Sizes, log: Log) -> list[str]:
    """`rest` without what a model has no use for: parts of prediction layers, if it has none."""
    kept = [name for name in rest if not name.endswith(_NEVER_USED)]
    if sizes.prediction_layers:
        return kept
    found = [name for name in kept if _PREDICTION.search(name)]
    if found:
        log(f"left out, the model has no prediction layers: {len(found)} tensors, such as "
            f"{found[0]}")  # fmt: skip
    return [name for name in kept if name not in set(found)]


def _shared(uses: Mapping[str, object], sizes: Sizes) -> dict[str, str]:
    """What prediction layers share with the model, which Hugging Face files hold again: name of the
    copy to the name of the original."""
    shared = {}
    for layer in range(sizes.layers, sizes.layers + sizes.prediction_layers):
        place = f"model.layers.{layer}."
        if f"{place}eh_proj.weight" in uses:
            shared[f"{place}embed_tokens.weight"] = "model.embed_tokens.weight"
            shared[f"{place}shared_head.head.weight"] = "lm_head.weight"
    return {copy: name for copy, name in shared.items() if name in uses}


def _check(source: Source, uses: Mapping[str, list[Use]], rules: Mapping[str, Rule]) -> None:
    """Check that each tensor is stored in one way, and in all parts of it. Raises `UserError`."""
    parts: dict[tuple[str, str], set[str]] = {}
    for rule in rules.values():
        for hf in rule.hf:
            parts.setdefault((hf, rule.form), set()).add(rule.mf)
    for name, found in uses.items():
        first = found[0]
        other = next((use for use in found if use.rule.form != first.rule.form), None)
        if other is not None:
            raise UserError(
                f"`{name}` is stored twice: in `{first.stored}` and in `{other.stored}`",
                where=str(source.path),
                rule="projections are either fused or separate",
                advice="Move away the files of the other form",
            )
        needed = parts[first.rule.hf[first.number], first.rule.form]
        missing = needed - {use.rule.mf for use in found}
        if missing:
            prefix = first.stored.removesuffix(first.rule.mf)
            raise UserError(
                f"{source.path} lacks `{prefix}{min(missing)}`",
                rule=f"it holds part of `{name}`, as `{first.stored}` does",
                advice="Copy the missing file, or give other weights",
            )


def _pieces(name: str, uses: list[Use], source: Source, sizes: Sizes) -> Pieces:
    """The pieces of tensor `name`, from all tensors that hold parts of it."""
    pieces, shapes = [], dict[Shape, str]()
    for use in uses:
        stored = source.tensors[use.stored]
        for one in links_of(use, stored[0].shape, sizes, source):
            shapes.setdefault(one.hf.shape, use.stored)
            same_bytes = stored
            if one.mf.shape != stored[0].shape:
                same_bytes = Pieces(reshaped(stored, one.mf.shape))
            axes = one.axes
            pieces += moved(same_bytes, one.mf, one.hf, axes)
    if len(shapes) > 1:
        (first, one), (second, other), *_ = shapes.items()
        raise UserError(
            f"`{name}` is {list(first)} by `{one}`, {list(second)} by `{other}`",
            where=str(source.path),
            rule="its parts must be of one tensor",
            advice="Give the config.json of these weights",
        )
    return Pieces(pieces)


def links_of(use: Use, shape: Shape, sizes: Sizes, source: Source) -> list[Link]:
    """What a stored tensor of `shape` shares with one that uses it. Raises `UserError` for a shape
    that does not fit the sizes of the model."""
    try:
        if not math.prod(shape):
            raise ValueError("it has no elements")
        links = use.rule.geometry.links(sizes, shape, use.number)
        for one in links:
            if math.prod(one.mf.shape) != math.prod(shape):
                raise ValueError(f"{list(one.mf.shape)} is needed")
        return links
    except ValueError as error:
        raise UserError(
            f"`{use.stored}` has shape {list(shape)}: {error}",
            where=str(source.path),
            rule="its shape must be that of the model: "
            f"{sizes.heads} heads, {sizes.groups} key/value heads, hidden size {sizes.hidden}"
            + (f", {sizes.experts} experts" if sizes.experts else ""),
            advice="Give the config.json of these weights",
        ) from error
