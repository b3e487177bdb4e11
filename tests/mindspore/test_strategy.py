"""Strategy files: MindSpore's are read and written back byte for byte, damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.mindspore import protobuf_wire
from launcher.mindspore.strategy import (
    COMPILED,
    Operator,
    Strategy,
    parse,
    serialize,
    strategy_file,
)
from launcher.mindspore.strategy_json import parse_json, serialize_json
from launcher.mindspore.tensor_layout import TensorLayout, entry
from tests.mindspore.golden import HERE, by_name, expected, strategy_files

SMALL = (HERE / "layout_dp2sp2mp2_opt" / "ckpt_strategy_rank_0.ckpt").read_bytes()
MOE = (HERE / "moe_dp4mp2_opt" / "ckpt_strategy_rank_0.ckpt").read_bytes()

GENUINE = pytest.mark.parametrize(
    "file", strategy_files(), ids=lambda file: f"{file.parent.name}-{file.stem[-1]}"
)


@GENUINE
def test_genuine_files_say_what_mindspore_reads_in_them(file: Path) -> None:
    assert by_name(parse(file.read_bytes(), str(file))) == expected(file)


@GENUINE
def test_genuine_files_are_written_back_byte_for_byte(file: Path) -> None:
    assert serialize(parse(file.read_bytes(), str(file))) == file.read_bytes()


@GENUINE
def test_the_json_twin_says_the_same(file: Path) -> None:
    strategy = parse(file.read_bytes(), str(file))
    assert parse_json(serialize_json(strategy), "twin.json") == strategy


def test_merged_genuine_files() -> None:
    file = HERE / "dp2mp2pp2_predict.merged.ckpt"
    merged = parse(file.read_bytes(), str(file))
    assert serialize(merged) == file.read_bytes()
    ours = {}
    for rank in (0, 4):
        part = HERE / "dp2mp2pp2_predict" / f"ckpt_strategy_rank_{rank}.ckpt"
        ours |= parse(part.read_bytes(), str(part)).by_stage()
    assert merged.by_stage() == ours
    assert list(merged.by_stage()) == [0, 1]
    assert merged.by_stage()[1]["lm_head.weight"] == TensorLayout((2, 2), ((0, -1),))


# Layouts and files made up here


def shapes(low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(low, high), max_size=3).map(tuple)


@st.composite
def layouts(draw) -> TensorLayout:
    grid = tuple(draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)))
    order = draw(st.permutations(range(len(grid))))
    entries: list[tuple[int, ...]] = [()]
    for axis in order:
        entries[-1] += (draw(st.sampled_from([axis, -1])),)
        if draw(st.booleans()):
            entries.append(())
    return TensorLayout(
        grid,
        tuple(entries),
        draw(st.integers(0, 300)),
        draw(st.integers(-1, 300)),
        draw(st.integers(-5, 300)),
        tuple(draw(st.lists(shapes(-(1 << 63), (1 << 63) - 1), max_size=2))),
        tuple(draw(st.lists(shapes(-(1 << 63), (1 << 63) - 1), max_size=2))),
    )


strategies = st.builds(
    Strategy,
    st.lists(
        st.builds(
            Operator,
            st.text(max_size=20),
            st.integers(0, (1 << 32) - 1),
            st.lists(shapes(0, (1 << 32) - 1), max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    st.lists(
        st.tuples(st.text(max_size=200), layouts()), max_size=4, unique_by=lambda item: item[0]
    ).map(tuple),
    st.integers(0, (1 << 32) - 1),
)


@given(strategy=strategies)
def test_what_is_written_is_read_back(strategy: Strategy) -> None:
    assert parse(serialize(strategy), "file") == strategy


@given(strategy=strategies)
def test_protobuf_itself_reads_and_writes_the_same(strategy: Strategy) -> None:
    message = _protobuf()()
    message.ParseFromString(serialize(strategy))
    assert message.SerializeToString() == serialize(strategy)
    assert message.current_stage == strategy.current_stage
    assert len(message.parallel_strategy_item) == len(strategy.operators)
    for item, (name, layout) in zip(message.parallel_layout_item, strategy.layouts, strict=True):
        said = item.parallel_layouts
        assert (item.param_name, tuple(said.dev_matrix[0].dim)) == (name, layout.dev_matrix)
        assert tuple(tuple(one.dim) for one in said.tensor_map) == layout.tensor_map
        assert said.opt_weight_shard_size == layout.shard_size


def test_every_genuine_file_is_what_protobuf_reads() -> None:
    for file in strategy_files():
        message = _protobuf()()
        message.ParseFromString(file.read_bytes())
        assert message.SerializeToString() == file.read_bytes()


_FIELDS = {
    "ParallelStrategyMap": "current_stage:1:required:uint32 parallel_strategy_item:2:repeated:"
    "ParallelStrategyItem parallel_layout_item:3:repeated:ParallelLayoutItem",
    "ParallelStrategyItem": "node_name:1:required:string "
    "parallel_strategys:2:required:ParallelStrategys",
    "ParallelStrategys": "stage:1:required:uint32 parallel_strategy:2:repeated:ParallelStrategy",
    "ParallelStrategy": "dim:1:repeated:uint32",
    "ParallelLayoutItem": "param_name:1:required:string "
    "parallel_layouts:2:required:ParallelLayouts",
    "ParallelLayouts": "dev_matrix:1:repeated:DevMatrix tensor_map:2:repeated:TensorMap "
    "param_split_shape:3:repeated:ParamSplitShape indices_offset:4:repeated:IndicesOffset "
    "field:5:required:int32 opt_weight_shard_step:6:required:int32 "
    "opt_weight_shard_size:7:required:int32",
    "DevMatrix": "dim:1:repeated:uint32",
    "TensorMap": "dim:1:repeated:int32",
    "ParamSplitShape": "dim:1:repeated:int64",
    "IndicesOffset": "dim:1:repeated:int64",
}
_made: dict[str, Any] = {}


def _protobuf() -> Any:
    """The class of `ParallelStrategyMap`, made by Google's library where it is installed."""
    descriptor = pytest.importorskip("google.protobuf.descriptor_pb2")
    factory = pytest.importorskip("google.protobuf.message_factory")
    if not _made:
        file = descriptor.FileDescriptorProto(
            name="node_strategy.proto", package="mindspore.straspb", syntax="proto2"
        )
        kind = descriptor.FieldDescriptorProto
        for name, fields in _FIELDS.items():
            message = file.message_type.add(name=name)
            for spelled in fields.split():
                field, number, label, what = spelled.split(":")
                made = message.field.add(name=field, number=int(number))
                made.label = getattr(kind, f"LABEL_{label.upper()}")
                if what in _FIELDS:
                    made.type, made.type_name = kind.TYPE_MESSAGE, f".mindspore.straspb.{what}"
                else:
                    made.type = getattr(kind, f"TYPE_{what.upper()}")
        _made.update(factory.GetMessages([file]))
    return _made["mindspore.straspb.ParallelStrategyMap"]


# Damaged files


def refused(data: bytes, where: str = "some/ckpt_strategy_rank_0.ckpt") -> str:
    with pytest.raises(UserError) as error:
        parse(data, where)
    assert str(error.value).startswith(f"{where}: byte ")
    return str(error.value)


def refusal(data: bytes) -> str | None:
    """What is said against `data`; None when it is a strategy, which then is written and read."""
    try:
        strategy = parse(data, "file")
    except UserError as error:
        return str(error)
    assert parse(serialize(strategy), "file") == strategy
    return None


def test_every_truncation_is_refused_or_ends_after_an_item() -> None:
    # The format has no end mark: what ends after an item is a shorter strategy.
    whole, said = parse(SMALL, "whole"), [refusal(SMALL[:length]) for length in range(len(SMALL))]
    assert said.count(None) == len(whole.operators) + len(whole.layouts)
    assert all(error.startswith("file: byte ") for error in said if error)
    shorter = parse(SMALL[: len(SMALL) - said[::-1].index(None) - 1], "part")
    assert shorter.layouts == whole.layouts[:-1]


@given(data=st.binary(max_size=80))
@example(b"\x08\x01\x1a\x00")
def test_bytes_of_any_kind_are_a_strategy_or_refused(data: bytes) -> None:
    assert (refusal(data) or "file: byte ").startswith("file: byte ")


@given(at=st.integers(0, len(MOE) - 1), value=st.integers(0, 255))
def test_a_changed_byte_is_a_strategy_or_refused(at: int, value: int) -> None:
    damaged = MOE[:at] + bytes([value]) + MOE[at + 1 :]
    assert (refusal(damaged) or "file: byte ").startswith("file: byte ")


def item(number: int, name: str = "w", **changes: bytes) -> bytes:
    """A message of one stage with one layout, whose parts `changes` replaces."""
    parts = {
        "grid": protobuf_wire.nested(1, protobuf_wire.integers(1, (2,))),
        "map": protobuf_wire.nested(2, protobuf_wire.integers(1, (0,))),
        "numbers": protobuf_wire.integer(5, 0)
        + protobuf_wire.integer(6, 0)
        + protobuf_wire.integer(7, 0),
        **changes,
    }
    content = protobuf_wire.nested(1, name.encode()) + protobuf_wire.nested(
        2, b"".join(parts.values())
    )
    return protobuf_wire.integer(1, 2) + protobuf_wire.nested(number, content)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "byte 0: the file is empty"),
        (b"\x08", "byte 1: a number is cut off"),
        (b"\x08" + b"\xff" * 11, "byte 1: a number has more than 10 bytes"),
        (b"\x08\x02\x08\x02", "byte 2: a second current_stage (field 1)"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "does not fit 32 bits"),
        (b"\x12\x00", "byte 2: the message from here on has no parallel_strategys (field 2)"),
        (
            b"\x08\x02\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
            "byte 2: field 2 claims 92233720368547",
        ),
        (b"\x0a\x02ab", "byte 0: field 1 is a length and bytes, not a number"),
        (b"\x08\x02\x10\x05", "byte 2: field 2 is a number, not a length and bytes"),
        (b"\x08\x02\x0b", "byte 2: 3 is not a wire type in use"),
        (b"\x08\x02\x00\x00", "byte 2: 0 is not a field number"),
        (item(3)[:2] + item(3)[2:].replace(b"w", b"\xff"), "byte 6: param_name is not UTF-8"),
        (item(3) + item(3)[2:], "a second layout of w"),
        (item(3, grid=b""), "byte 4: w has 0 device matrices, not 1"),
        (
            item(3, grid=protobuf_wire.nested(1, protobuf_wire.integers(1, (0,)))),
            "byte 4: w: device matrix [0]",
        ),
        (
            item(3, map=protobuf_wire.nested(2, protobuf_wire.integers(1, (5,)))),
            "byte 4: w: tensor map ((5,),) on 1",
        ),
        (item(3, numbers=protobuf_wire.integer(5, 0)), "has no opt_weight_shard_step (field 6)"),
    ],
)
def test_damage_is_named_with_its_byte(data: bytes, said: str) -> None:
    assert said in refused(data)


def test_the_error_has_four_parts() -> None:
    assert refused(b"\x0a\x02ab", "w.ckpt") == (
        "w.ckpt: byte 0: field 1 is a length and bytes, not a number: a strategy file is a "
        "protobuf message ParallelStrategyMap. Files of weights also end in .ckpt. Copy the file "
        "again, or have the run that wrote it write it again."
    )


def test_unknown_fields_are_skipped_and_packed_numbers_read() -> None:
    unknown = (
        protobuf_wire.integer(9, 1 << 40)
        + protobuf_wire.nested(1000, b"anything")
        + protobuf_wire.varint(10 << 3 | protobuf_wire.FIXED32) + b"1234"
        + protobuf_wire.varint(11 << 3 | protobuf_wire.FIXED64) + b"12345678"
    )  # fmt: skip
    packed = protobuf_wire.nested(1, protobuf_wire.nested(1, b"\x02\xac\x02"))
    data = item(3, grid=packed, more=unknown) + unknown
    assert parse(data, "file").layouts == (("w", TensorLayout((2, 300), ((0,),), 0, 0, 0, (), ())),)


# What we write


MESH = {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 2, "ep": 1}


def entries_of_a_model(layers: int) -> dict[str, TensorLayout]:
    found = {}
    for index in range(layers):
        for name, shape, specs in (
            ("self_attn.q_proj.weight", (64, 32), (("tp", 0), ("dp_shard", 0))),
            ("self_attn.o_proj.weight", (32, 64), (("tp", 1), ("dp_shard", 0))),
            ("input_layernorm.weight", (32,), (("dp_shard", 0),)),
        ):
            made = entry(shape, specs, MESH)
            assert made is not None
            found[f"model.layers.{index}.{name}"] = made
    return found


def test_a_file_of_ours() -> None:
    entries = entries_of_a_model(2)
    data = strategy_file(entries, 1, prefixes=("adam_m.", "adam_v."))
    strategy = parse(data, "ours")
    assert strategy.current_stage == COMPILED
    assert strategy.by_stage() == {
        1: {prefix + name: layout for prefix in ("", "adam_m.", "adam_v.")
            for name, layout in entries.items()}
    }  # fmt: skip
    assert strategy.operators[0] == Operator("MatMul_model.layers.0.self_attn.q_proj.weight", 1)
    assert [operator.name.split("_")[0] for operator in strategy.operators[:3]] == [
        "MatMul", "MatMul", "Mul",
    ]  # fmt: skip
    assert len(strategy.operators) == len(entries)
    assert data == strategy_file(entries, 1, prefixes=("adam_m.", "adam_v."))
    assert set(strategy_file(entries, 1)) < set(data)


def test_scalars_are_left_out() -> None:
    scalar = entry((), (), MESH)
    assert scalar is not None
    strategy = parse(strategy_file({"step": scalar, **entries_of_a_model(1)}, 0), "ours")
    assert "step" not in strategy.by_stage()[0]


def test_a_hyphen_in_a_name() -> None:
    with pytest.raises(UserError) as error:
        strategy_file({"layers-0.weight": TensorLayout((2,), ((0,),))}, 0)
    assert str(error.value) == (
        "parameter layers-0.weight has a hyphen: in strategy files a hyphen separates stage and "
        "parameter. Possible: layers_0.weight. Rename the parameter, or save without strategy "
        "files."
    )


# The JSON twin


def json_file(**changes: Any) -> dict[str, Any]:
    layout = {
        "dev_matrix": [2, 2], "tensor_map": [1, -1], "tensor_shape": [4, 4], "field": 0,
        "opt_weight_shard_step": 0, "opt_weight_shard_size": 0, **changes,
    }  # fmt: skip
    return {
        "current_stage": 2,
        "parallel_strategy_item": {"MatMul_w": {"stage": 1}},
        "parallel_layout_item": {"w": {key: v for key, v in layout.items() if v is not None}},
    }


def test_json_as_mindspore_writes_it() -> None:
    made = parse_json(json.dumps(json_file()).encode(), "s.json")
    assert made.operators == (Operator("MatMul_w", 1),)
    assert made.by_stage() == {1: {"w": TensorLayout((2, 2), ((1, -1),))}}
    nested = json_file(tensor_map=[[1, 0], [-1]], param_split_shape=[1, 3], indices_offset=[0, 1])
    (item,) = parse_json(json.dumps(nested).encode(), "s.json").layouts
    assert item[1].tensor_map == ((1, 0), (-1,))
    assert (item[1].param_split_shape, item[1].indices_offset) == (((1, 3),), ((0, 1),))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value: line 1 column 1"),
        (b"\xff\xfe\x00", "decode"),
        (b"[1]", "list indices"),
        (b"{}", "no entry 'parallel_strategy_item'"),
        (b"[" * 100_000, "recursion"),
        (json.dumps(json_file(tensor_map=None)).encode(), "w has no 'tensor_map'"),
        (json.dumps(json_file(dev_matrix=["2"])).encode(), "w: '2' is not a 32-bit integer"),
        (json.dumps(json_file(dev_matrix=5)).encode(), "w: 'int' object is not iterable"),
        (json.dumps(json_file(field=1 << 40)).encode(), "w: 1099511627776 is not a 32-bit integer"),
        (json.dumps(json_file(tensor_map=[7])).encode(), "w: tensor map ((7,),) on 2 grid axes"),
        (json.dumps(json_file(tensor_map=[[0], 1])).encode(), "w: 'int' object is not iterable"),
    ],
)
def test_json_that_is_no_strategy(data: bytes, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_json(data, "s.json")
    assert str(error.value).startswith("s.json: ")
    assert said in str(error.value)
    assert "Copy the file again" in str(error.value)
