"""`transforms` do what `datasets` does; `column_map` takes fields from columns of other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataLoaderSection
from launcher.config.schema.transforms import TRANSFORMS, Transform, parse_transform
from launcher.data.column_map import map_columns
from launcher.data.loaders import read_samples, source_files
from launcher.data.records import Record, convert_records
from launcher.data.tally import Tally
from launcher.data.transforms import apply_transform
from launcher.errors import UserError
from tests.data.conftest import Build

ROWS = [
    {"text": f"t{n}", "n": (n * 7) % 5, "m": None if n % 4 == 3 else n % 3,
     "d": {"q": f"q{n}", "e": {"x": n}}}
    for n in range(11)
]  # fmt: skip

STEPS: list[dict[str, Any]] = [
    {"type": "take", "n": 3},
    {"type": "take", "n": 0},
    {"type": "skip", "n": 9},
    {"type": "select", "indices": [4, 4, 0]},
    {"type": "shuffle", "seed": 3},
    {"type": "sort", "column_names": "n"},
    {"type": "sort", "column_names": ["n"], "reverse": True},
    {"type": "sort", "column_names": ["m", "text"], "reverse": [True, False]},
    {"type": "sort", "column_names": ["m", "n"], "reverse": [False, True]},
    {"type": "shard", "num_shards": 3, "index": 1},
    {"type": "shard", "num_shards": 3, "index": 2, "contiguous": False},
    {"type": "flatten"},
    {"type": "rename_column", "original_column_name": "n", "new_column_name": "k"},
    {"type": "rename_columns", "column_mapping": {"n": "m", "m": "n"}},
    {"type": "remove_columns", "column_names": ["n", "d"]},
    {"type": "select_columns", "column_names": "text"},
]


def records(rows: list[dict[str, Any]], *, table: bool = True) -> list[Record]:
    return [Record(f"r:{n}", row, has_all_columns=table) for n, row in enumerate(rows, 1)]


def values(found: Any) -> list[dict[str, Any]]:
    return [record.value for record in convert_records(found, lambda record: record)]


def step_of(entry: dict[str, Any]) -> Transform:
    step = parse_transform(entry)
    assert isinstance(step, Transform), step
    return step


@pytest.mark.parametrize("entry", STEPS, ids=str)
def test_a_step_does_what_datasets_does(entry: dict[str, Any]) -> None:
    import datasets

    arguments = {name: value for name, value in entry.items() if name != "type"}
    expected = getattr(datasets.Dataset.from_list(ROWS), entry["type"])(**arguments).to_list()
    assert values(apply_transform(records(ROWS), step_of(entry))) == expected


def test_every_step_is_tested() -> None:
    assert {entry["type"] for entry in STEPS} == set(TRANSFORMS)


WRONG_STEPS: list[tuple[Any, str, str, str]] = [
    ({"type": "tkae", "n": 1}, "type", "no such step", "did you mean `take`?"),
    ({"type": "something"}, "type", "no such step", "Steps: take"),
    ({"n": 1}, "", "key `type`", "Steps: take"),
    ("take", "", "key `type`", ""),
    ({"type": "take"}, "", "requires the argument `n`", ""),
    ({"type": "take", "n": -1}, "n", "0 or more", ""),
    ({"type": "take", "n": True}, "n", "0 or more", ""),
    ({"type": "take", "count": 3}, "count", "not an argument", "Its arguments: n"),
    ({"type": "shuffle", "sed": 3}, "sed", "not an argument", "did you mean `seed`?"),
    ({"type": "shuffle", "generator": 3}, "generator", "not an argument", "Its arguments: seed"),
    ({"type": "sort", "column_names": []}, "column_names", "a list of names", ""),
    ({"type": "sort", "column_names": "n", "reverse": [True, False]}, "reverse", "1 column", ""),
    ({"type": "shard", "num_shards": 2, "index": 2}, "index", "below num_shards", "Nearest: 1"),
    ({"type": "shard", "num_shards": 0, "index": 0}, "num_shards", "above 0", ""),
    ({"type": "select", "indices": [1, "2"]}, "indices", "integers", ""),
    ({"type": "rename_columns", "column_mapping": {"a": "c", "b": "c"}}, "column_mapping",
     "differ", ""),
    ({"type": "map", "function": "print"}, "type", "nothing that a configuration names", ""),
    ({"type": "filter"}, "type", "nothing that a configuration names", ""),
    ({"type": "train_test_split", "test_size": 0.1}, "type", "two data sets", ""),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "key", "rule", "nearest"), WRONG_STEPS, ids=str)
def test_wrong_steps(entry: Any, key: str, rule: str, nearest: str) -> None:
    found = parse_transform(entry)
    assert isinstance(found, list)
    (wrong,) = [one for one in found if "requires" not in one.rule or not key]
    assert wrong.key == key
    assert rule in wrong.rule
    assert nearest in wrong.nearest


WRONG_DATA: list[tuple[dict[str, Any], list[str]]] = [
    ({"type": "select", "indices": [3, 11]}, ["index 11", "11 records", "Nearest: 10"]),
    ({"type": "sort", "column_names": "nn"}, ["no column 'nn'", "did you mean `n`?"]),
    ({"type": "sort", "column_names": "mixed"}, ["'mixed' has a string", "r:1"]),
    ({"type": "remove_columns", "column_names": ["n", "txet"]}, ["'txet'", "`text`"]),
    ({"type": "rename_column", "original_column_name": "n", "new_column_name": "m"},
     ["'m'", "column already"]),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "words"), WRONG_DATA, ids=str)
@pytest.mark.parametrize("table", [True, False])
def test_columns_and_indices_that_do_not_exist(
    entry: dict[str, Any], words: list[str], table: bool
) -> None:
    rows = [{**row, "mixed": n if n % 2 else str(n)} for n, row in enumerate(ROWS, 1)]
    with pytest.raises(UserError) as error:
        values(apply_transform(records(rows, table=table), step_of(entry)))
    for word in words:
        assert word in str(error.value)


def test_records_without_a_column_that_others_have() -> None:
    """Lines of JSON need not have the same fields."""
    rows = [{"a": 1}, {"a": 2, "b": 3}]
    step = step_of({"type": "rename_column", "original_column_name": "b", "new_column_name": "c"})
    assert values(apply_transform(records(rows, table=False), step)) == [
        {"a": 1}, {"a": 2, "c": 3},
    ]  # fmt: skip


MAPS: list[tuple[dict[str, str], dict[str, Any], dict[str, Any]]] = [
    ({"instruction": "q", "output": "a"}, {"q": 1, "a": 2, "id": 3},
     {"id": 3, "instruction": 1, "output": 2}),
    ({"text": "text"}, {"text": 1}, {"text": 1}),
    ({"input": "output", "output": "input"}, {"input": 1, "output": 2}, {"input": 2, "output": 1}),
    ({"instruction": "q", "output": "q"}, {"q": 1}, {"instruction": 1, "output": 1}),
    ({"text": "d.q"}, {"d": {"q": 1}}, {"text": 1}),
    ({"text": "d.q"}, {"d.q": 1, "d": {"q": 2}}, {"text": 1, "d": {"q": 2}}),
    ({"text": "d.e.x"}, {"d": {"e": {"x": 1}}}, {"text": 1}),
    ({"output": "a", "input": "b"}, {"output": "", "a": 1, "b": None},
     {"output": 1, "input": None}),
]  # fmt: skip


@pytest.mark.parametrize(("column_map", "row", "expected"), MAPS, ids=str)
def test_column_map(
    column_map: dict[str, str], row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert values(map_columns(records([row]), column_map)) == [expected]


WRONG_MAPS: list[tuple[dict[str, str], list[dict[str, Any]], list[str]]] = [
    ({"text": "bdoy"}, [{"body": 1}], ["r:1", "'bdoy'", "did you mean `body`?"]),
    ({"text": "b"}, [{"x": 1}], ["Columns found: x"]),
    ({"input": "context"}, [{"a": 1}, {"contxt": 1}], ["'context'", "column_map"]),
    ({"text": "d.r"}, [{"d": {"q": 1}}], ["'d.r'"]),
    ({"output": "answer"}, [{"output": "x", "answer": "y"}],
     ["'output'", "'answer'", "one column"]),
]  # fmt: skip


@pytest.mark.parametrize(("column_map", "rows", "words"), WRONG_MAPS, ids=str)
def test_wrong_column_maps(
    column_map: dict[str, str], rows: list[dict[str, Any]], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        values(map_columns(records(rows, table=False), column_map))
    for word in words:
        assert word in str(error.value)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_steps_go_over_all_files_and_before_column_map(tmp_path: Path) -> None:
    for part in range(3):
        rows = [{"d": {"body": f"{part}{n}"}, "n": -n} for n in range(4)]
        write(tmp_path, f"train-{part}.jsonl", rows)
    section = DataLoaderSection(
        type="HFDataLoader", path=str(tmp_path), split="train[1:-1]", num_samples=3,
        column_map={"text": "words"},
        transforms=[
            {"type": "flatten"}, {"type": "sort", "column_names": "n"}, {"type": "take", "n": 5},
            {"type": "rename_column", "original_column_name": "d.body", "new_column_name": "words"},
            {"type": "skip", "n": 1},
        ],
    )  # fmt: skip
    tally = Tally()
    found = list(read_samples(section, source_files(section), tmp_path / "c", tally))
    assert [document.text for document in found] == ["13", "02", "12"]
    assert found[0].where.endswith("train-1.jsonl:4")
    assert tally.documents == 3


FORMATS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"question": "Why?", "answer": "So."},
     {"column_map": {"instruction": "question", "output": "answer"}}),
    ({"dialogue": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
     {"column_map": {"messages": "dialogue"}}),
    ({"d": {"talk": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}},
     {"column_map": {"conversations": "d.talk"}}),
    ({"q": "Why?", "a": "So.", "sys": None},
     {"column_map": {"instruction": "q", "output": "a", "system": "sys"}, "format": "alpaca"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "settings"), FORMATS, ids=["alpaca", "messages", "dotted", "null"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_with_other_columns(
    row: dict[str, Any], settings: dict[str, Any], suffix: str, tmp_path: Path, build: Build,
    logged: list[str], chat_tokenizer: Any,
) -> None:  # fmt: skip
    import datasets

    path = write(tmp_path, "a.jsonl", [row])
    if suffix == "parquet":
        path = str(tmp_path / "a.parquet")
        datasets.Dataset.from_list([row, row]).to_parquet(path)
    dataset = build(type="InstructionDataLoader", dataset_files=path, tokenizer=chat_tokenizer,
                    seq_length=64, packing=False, **settings)  # fmt: skip
    labels = dataset.row(0).labels
    assert chat_tokenizer.decode(labels[labels != -100]) == "So.<|im_end|>"
    assert not [line for line in logged if "not used" in line]


def test_the_cache_is_keyed_by_what_is_read(
    tmp_path: Path, build: Build, logged: list[str]
) -> None:
    path = write(tmp_path, "a.jsonl", [{"a": "one ship", "b": "two ships"}] * 3)
    used: list[dict[str, Any]] = [
        {"column_map": {"text": "a"}},
        {"column_map": {"text": "b"}},
        {"column_map": {"text": "b"}, "transforms": [{"type": "take", "n": 1}]},
        {"column_map": {"text": "b"}, "split": "train[:2]"},
    ]
    contents = {build(type="HFDataLoader", dataset_files=path, **more).content for more in used}
    assert len(contents) == len(used)
    assert not any("from the cache" in line for line in logged)
    build(type="HFDataLoader", dataset_files=path, **used[0])
    assert "from the cache" in logged[-1]
