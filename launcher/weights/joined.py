"""Tensors that are one in complete Hugging Face weights and several in a model.

    in files: mlp.gate_up_proj.weight [2F, H]    in the model: mlp.gate_proj.weight [F, H], then
                                                               mlp.up_proj.weight [F, H]

Tensor parallelism shards each of the several; as one, a rank would hold two boxes of it. So rank
files have them apart, as the model does, and complete weights are written with them together.
Owns both ways between: nothing is read or copied, tensors become boxes of others. Optimizer state
and scales of FP8 follow their weights. Which modules they are is up to the families, by
`launcher.extensions.JOINED_MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.errors import UserError
from launcher.extensions import JOINED_MODULES, installed
from launcher.layout.box import Shape
from launcher.weights.geometry import Side, Span, full_side, moved
from launcher.weights.optimizer_state import parameter_of
from launcher.weights.pieces import Piece, Pieces
from launcher.weights.scales import SUFFIX
from launcher.weights.source import Source
from launcher.weights.translated import Translated

Modules = Mapping[str, tuple[str, ...]]
"""Module in files, below its layer, to the modules of the model whose rows it has, in order; each
has as many."""


def apart(
    source: Source, config: Mapping[str, Any] | None, wanted: Container[str] | None = None
) -> Source:
    """`source` with the names of the model: what files have together is several tensors.

    `config`: content of config.json. `wanted`: only into parameters with these names, of any model.
    Raises `UserError` for tensors that cannot be divided.
    """
    origin: dict[str, tuple[str, int, int]] = {}
    """Part to the tensor in files, the number of the part in it, the number of parts."""
    modules = _modules(config, of_any=wanted is not None)
    for name in source.tensors:
        parts = _replaced(name, modules.items()) or ()
        if wanted is None or all(parameter_of(part) in wanted for part in parts):
            origin |= {part: (name, number, len(parts)) for number, part in enumerate(parts)}
    if not origin:
        return source
    _check_once(source, origin)
    joined = {name for name, _, _ in origin.values()}
    scales = {name: factors for name, factors in source.scales.items() if name not in joined}
    for part, (name, _, count) in origin.items():
        _check_rows(source, name, count)
        if name in source.scales:
            scales[part] = part + SUFFIX
    make = lambda part: _part(source, *origin[part])  # noqa: E731
    changed = _changed(source, origin, joined, make)
    return replace(changed, scales=scales)


def together(
    source: Source, config: Mapping[str, Any] | None, wanted: Container[str] | None = None
) -> Source:
    """`source` with the names of files: what these have together is one tensor.

    `config`: content of config.json. `wanted`: only the tensors of files with these names, of any
    model. Raises `UserError` for parts that do not fit each other.
    """
    parts_of: dict[str, tuple[str, ...]] = {}
    for end, many in _modules(config, of_any=wanted is not None).items():
        for first in source.tensors:
            name = next(iter(_replaced(first, [(many[0], (end,))]) or ()), None)
            if name is None or (wanted is not None and name not in wanted):
                continue
            parts = _replaced(name, [(end, many)]) or ()
            if all(part in source.tensors for part in parts):
                parts_of[name] = parts
    if not parts_of:
        return source
    for name, parts in parts_of.items():
        _check_parts(source, name, parts)
    taken = {part for parts in parts_of.values() for part in parts}
    return _changed(source, parts_of, taken, lambda name: _joined(source, parts_of[name]))


def _modules(config: Mapping[str, Any] | None, *, of_any: bool = False) -> Modules:
    """The modules of a model that are together in files."""
    tables: dict[str, Modules] = installed(JOINED_MODULES)
    if of_any:
        return {end: parts for table in tables.values() for end, parts in table.items()}
    return tables.get(str((config or {}).get("model_type")), {})


def _replaced(name: str, modules: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[str, ...] | None:
    """The names in which the module of tensor `name` is replaced; None for other modules."""
    module, _, kind = name.rpartition(".")
    for end, others in modules:
        place = module.removesuffix(end)
        if place != module and (not place or place.endswith(".")):
            return tuple(f"{place}{other}.{kind}" for other in others)
    return None


def _changed(
    source: Source, made: Iterable[str], replaced: Container[str], make: Callable[[str], Pieces]
) -> Source:
    """`source` with the tensors `made` instead of those `replaced`."""
    new = dict.fromkeys(made)
    kept = [name for name in source.tensors if name not in replaced]

    def pieces(name: str) -> Pieces:
        return make(name) if name in new else source.tensors[name]

    return replace(source, tensors=Translated(pieces, [*new, *kept], {}))


def _rows(shape: Shape, first: int, count: int) -> Side:
    """Rows of a tensor of `shape`."""
    everything = full_side(shape)
    return everything._replace(index=(Span(first, count), *everything.index[1:]))


def _part(source: Source, name: str, number: int, count: int) -> Pieces:
    """The pieces of one of `count` equal parts of tensor `name`."""
    shape = source.shape(name)
    rows = shape[0] // count
    part = full_side((rows, *shape[1:]))
    return Pieces(
        moved(source.tensors[name], _rows(shape, number * rows, rows), part, range(len(shape)))
    )


def _joined(source: Source, parts: Sequence[str]) -> Pieces:
    """The pieces of the tensor whose equal parts are `parts`."""
    rows, *rest = source.shape(parts[0])
    shape, found = (len(parts) * rows, *rest), list[Piece]()
    for number, part in enumerate(parts):
        place = _rows(shape, number * rows, rows)
        found += moved(source.tensors[part], full_side((rows, *rest)), place, range(len(shape)))
    return Pieces(found)


def _check_once(source: Source, origin: Mapping[str, tuple[str, int, int]]) -> None:
    for part, (name, _, _) in origin.items():
        if part in source.tensors:
            raise UserError(
                f"`{part}` is stored twice: under this name and in `{name}`",
                where=str(source.path),
                rule="projections are either fused or separate",
                advice="Move away the files of the other form",
            )


def _check_rows(source: Source, name: str, count: int) -> None:
    shape = source.shape(name)
    if not shape or shape[0] % count:
        raise UserError(
            f"`{name}` has shape {list(shape)}",
            where=str(source.path),
            rule=f"its rows are those of {count} projections, which have as many each",
            advice="Give the config.json of these weights",
        )
    block = source.scale_block[0]
    if name in source.scales and shape[0] // count % block:
        raise UserError(
            f"`{name}` has {shape[0]} rows, and blocks of {block} rows share a scale",
            where=str(source.path),
            rule=f"FP8 weights can be divided between blocks alone, here into {count} projections",
            advice="Give weights that are not quantized",
        )


def _check_parts(source: Source, name: str, parts: Sequence[str]) -> None:
    """Check that `parts` can be one tensor."""
    looks = {part: (source.shape(part), source.dtype(part)) for part in parts}
    for part, look in looks.items():
        if look != looks[parts[0]]:
            (first, dtype), (shape, other) = looks[parts[0]], look
            raise UserError(
                f"`{parts[0]}` is {dtype} {list(first)}, `{part}` is {other} {list(shape)}",
                where=str(source.path),
                rule=f"they become one tensor, `{name}`",
                advice="Give weights of one dtype and shape",
            )
