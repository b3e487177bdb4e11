"""Strategies: MindSpore's record of how the parameters of a pipeline stage are sharded.

Owns the content of a strategy file and its protobuf form, the message `ParallelStrategyMap`
(`strategy_json` has the JSON form). Invariants: content is checked before it is used, and an error
names file and byte; reading what was written gives the same; equal content gives equal bytes, so
all ranks of a stage write the same file. It has no shapes, and the stage of a parameter only in the
operators; in a merged file parameters are named "<stage>-<parameter>".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.mindspore import protobuf_wire
from launcher.mindspore.tensor_layout import TensorLayout

COMPILED, MERGED = 2, 1
"""`current_stage`: a counter, 2 in compiled files and 1 in merged ones; no pipeline stage."""
_OPERATORS = {0: "Mul", 1: "Mul", 2: "MatMul"}


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator that uses a parameter."""

    name: str
    """`<Op>_<parameter>`."""
    stage: int
    """Pipeline stage."""
    cuts: tuple[Shape, ...] = ()
    """For each input, the number of pieces of each dim; empty where layouts have it."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """The content of a strategy file, in file order."""

    operators: tuple[Operator, ...]
    layouts: tuple[tuple[str, TensorLayout], ...]
    """(parameter, layout); in a merged file the parameter is `<stage>-<parameter>`."""
    current_stage: int = COMPILED

    @property
    def stage(self) -> int:
        """The pipeline stage: that of the first operator, as in MindSpore's tools."""
        return self.operators[0].stage if self.operators else 0

    def by_stage(self) -> dict[int, dict[str, TensorLayout]]:
        """Pipeline stage to the layout of each of its parameters, whether merged or not."""
        stages: dict[int, dict[str, TensorLayout]] = {}
        for name, layout in self.layouts:
            stage, separator, parameter = name.partition("-")
            if not separator or not stage.isdecimal():
                stage, parameter = str(self.stage), name
            stages.setdefault(int(stage), {})[parameter] = layout
        return dict(sorted(stages.items()))


def strategy_file(
    entries: Mapping[str, TensorLayout], stage: int, *, prefixes: Iterable[str] = ()
) -> bytes:
    """The bytes of the strategy file of one pipeline stage; all its ranks write the same.

    `entries`: parameter name to layout. `prefixes`: also list each parameter under these, for
    optimizer state, which is sharded alike. Scalars are left out, as MindSpore does. Raises
    `UserError` for a name with a hyphen.
    """
    _no_hyphens(entries)
    kept = {name: layout for name, layout in entries.items() if layout.positions}
    return serialize(
        Strategy(
            tuple(
                Operator(f"{_OPERATORS.get(len(layout.positions), 'BatchMatMul')}_{name}", stage)
                for name, layout in kept.items()
            ),
            tuple(
                (prefix + name, layout)
                for prefix in ("", *prefixes)
                for name, layout in kept.items()
            ),
        )
    )


def _no_hyphens(names: Iterable[str]) -> None:
    if wrong := next((name for name in names if "-" in name), None):
        raise UserError(
            f"parameter {wrong} has a hyphen",
            rule="in strategy files a hyphen separates stage and parameter",
            nearest=f"Possible: {wrong.replace('-', '_')}",
            advice="Rename the parameter, or save without strategy files",
        )


def parse(data: bytes, where: str) -> Strategy:
    """The strategy in the protobuf message `data`. Raises `UserError` naming `where` and byte."""
    try:
        if not data:
            raise protobuf_wire.WireError(0, "the file is empty")
        message = protobuf_wire.Message(data)
        return Strategy(
            tuple(map(_operator, message.messages(2))),
            _layout_items(message.messages(3)),
            message.integer(1, "current_stage", signed=False),
        )
    except protobuf_wire.WireError as error:
        raise UserError(
            str(error),
            where=where,
            rule="a strategy file is a protobuf message ParallelStrategyMap",
            nearest="Files of weights also end in .ckpt",
            advice="Copy the file again, or have the run that wrote it write it again",
        ) from None


def _operator(item: protobuf_wire.Message) -> Operator:
    strategys = item.message(2, "parallel_strategys")
    return Operator(
        item.text(1, "node_name"),
        strategys.integer(1, "stage", signed=False),
        tuple(cut.integers(1, signed=False) for cut in strategys.messages(2)),
    )


def _layout_items(items: Iterable[protobuf_wire.Message]) -> tuple[tuple[str, TensorLayout], ...]:
    layouts: dict[str, TensorLayout] = {}
    for item in items:
        name, layout = _layout_item(item)
        if name in layouts:
            raise protobuf_wire.WireError(item.start, f"a second layout of {name}")
        layouts[name] = layout
    return tuple(layouts.items())


def _layout_item(item: protobuf_wire.Message) -> tuple[str, TensorLayout]:
    name, layouts = item.text(1, "param_name"), item.message(2, "parallel_layouts")
    grids = [grid.integers(1, signed=False) for grid in layouts.messages(1)]
    if len(grids) != 1:
        raise protobuf_wire.WireError(item.start, f"{name} has {len(grids)} device matrices, not 1")
    try:
        return name, TensorLayout(
            dev_matrix=grids[0],
            tensor_map=tuple(entry.integers(1) for entry in layouts.messages(2)),
            shard_step=layouts.integer(6, "opt_weight_shard_step"),
            shard_size=layouts.integer(7, "opt_weight_shard_size"),
            field=layouts.integer(5, "field"),
            param_split_shape=tuple(s.integers(1, bits=64) for s in layouts.messages(3)),
            indices_offset=tuple(s.integers(1, bits=64) for s in layouts.messages(4)),
        )
    except protobuf_wire.WireError:
        raise
    except ValueError as error:
        raise protobuf_wire.WireError(item.start, f"{name}: {error}") from None


def serialize(strategy: Strategy) -> bytes:
    """The protobuf message, byte for byte as MindSpore writes this content."""
    parts = [protobuf_wire.integer(1, strategy.current_stage)]
    for operator in strategy.operators:
        strategys = protobuf_wire.integer(1, operator.stage) + b"".join(
            protobuf_wire.nested(2, protobuf_wire.integers(1, cut)) for cut in operator.cuts
        )
        parts.append(protobuf_wire.nested(2, _item(operator.name, strategys)))
    for name, layout in strategy.layouts:
        parts.append(protobuf_wire.nested(3, _item(name, _layouts(layout))))
    return b"".join(parts)


def _item(name: str, content: bytes) -> bytes:
    return protobuf_wire.nested(1, name.encode()) + protobuf_wire.nested(2, content)


@cache
def _layouts(layout: TensorLayout) -> bytes:
    """Cached: a model has hundreds of parameters and few layouts."""
    repeated = ((1, (layout.dev_matrix,)), (2, layout.tensor_map),
                (3, layout.param_split_shape), (4, layout.indices_offset))  # fmt: skip
    return b"".join(
        protobuf_wire.nested(number, protobuf_wire.integers(1, entry))
        for number, entries in repeated
        for entry in entries
    ) + b"".join(
        protobuf_wire.integer(number, value)
        for number, value in ((5, layout.field), (6, layout.shard_step), (7, layout.shard_size))
    )
