"""The JSON form of a strategy file, which MindSpore uses for names that end in `.json`.

Owns the JSON form only; the content is a `Strategy`. Keys that the protobuf form does not have
(`tensor_shape`, ...) are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.mindspore.strategy import Operator, Strategy
from launcher.mindspore.tensor_layout import TensorLayout


def parse_json(data: bytes, where: str) -> Strategy:
    """The strategy in the JSON `data`. Raises `UserError` naming `where` and the entry."""
    try:
        root = json.loads(data)
        operators, layouts = root["parallel_strategy_item"], root["parallel_layout_item"]
        return Strategy(
            tuple(
                Operator(name, _int32(item["stage"]), _rows(item.get("parallel_strategy", [])))
                for name, item in operators.items()
            ),
            tuple((name, _json_layout(name, item)) for name, item in layouts.items()),
            _int32(root["current_stage"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            what,
            where=where,
            rule="a strategy file in JSON maps current_stage, parallel_strategy_item and "
            "parallel_layout_item",
            advice="Copy the file again, or have the run that wrote it write it again",
        ) from None


def _json_layout(name: str, item: Mapping[str, Any]) -> TensorLayout:
    try:
        tensor_map = item["tensor_map"]
        nested = any(isinstance(entry, list) for entry in tensor_map)
        return TensorLayout(
            dev_matrix=_row(item["dev_matrix"]),
            tensor_map=_rows(tensor_map) if nested else (_row(tensor_map),),
            shard_step=_int32(item["opt_weight_shard_step"]),
            shard_size=_int32(item["opt_weight_shard_size"]),
            field=_int32(item["field"]),
            param_split_shape=(_row(item.get("param_split_shape", [])),),
            indices_offset=(_row(item.get("indices_offset", [])),),
        )
    except KeyError as error:
        raise ValueError(f"{name} has no {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None


def _int32(value: Any) -> int:
    if type(value) is not int or not -(1 << 31) <= value < 1 << 31:
        raise ValueError(f"{value!r} is not a 32-bit integer")
    return value


def _row(values: list[Any]) -> Shape:
    return tuple(map(_int32, values))


def _rows(values: list[Any]) -> tuple[Shape, ...]:
    return tuple(map(_row, values))


def serialize_json(strategy: Strategy) -> bytes:
    """The JSON form of a strategy."""
    layouts = {}
    for name, layout in strategy.layouts:
        nested = len(layout.tensor_map) > 1
        layouts[name] = {
            "dev_matrix": layout.dev_matrix,
            "tensor_map": layout.tensor_map if nested else sum(layout.tensor_map, ()),
            "field": layout.field,
            "opt_weight_shard_step": layout.shard_step,
            "opt_weight_shard_size": layout.shard_size,
        }
        if any(layout.param_split_shape):
            layouts[name]["param_split_shape"] = sum(layout.param_split_shape, ())
            layouts[name]["indices_offset"] = sum(layout.indices_offset, ())
    operators = {
        operator.name: {"stage": operator.stage, "parallel_strategy": operator.cuts}
        for operator in strategy.operators
    }
    return json.dumps({
        "current_stage": strategy.current_stage,
        "parallel_strategy_item": operators,
        "parallel_layout_item": layouts,
    }).encode()  # fmt: skip
