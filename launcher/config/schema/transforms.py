"""`data_loader.transforms`: steps that select, order and rename records before they are tokenized.

Owns their names and arguments, which are those of the methods of `datasets.Dataset`. Pure: the
steps themselves are in launcher/data/transforms.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import did_you_mean

REQUIRED = object()


@dataclass(frozen=True)
class Argument:
    """One argument of a transform."""

    kind: str
    """What it must be; a key of `_KINDS`."""
    default: Any = REQUIRED


TRANSFORMS: dict[str, dict[str, Argument]] = {
    "take": {"n": Argument("a count")},
    "skip": {"n": Argument("a count")},
    "select": {"indices": Argument("indices")},
    "shuffle": {"seed": Argument("a count", 0)},
    "sort": {
        "column_names": Argument("columns"),
        "reverse": Argument("switches", False),
    },
    "shard": {
        "num_shards": Argument("a positive count"),
        "index": Argument("a count"),
        "contiguous": Argument("a switch", True),
    },
    "flatten": {"max_depth": Argument("a positive count", 16)},
    "rename_column": {
        "original_column_name": Argument("a column"),
        "new_column_name": Argument("a column"),
    },
    "rename_columns": {"column_mapping": Argument("a mapping")},
    "remove_columns": {"column_names": Argument("columns")},
    "select_columns": {"column_names": Argument("columns")},
}
"""Name to arguments."""

NEEDS_ALL = frozenset({"select", "shuffle", "sort", "shard"})
"""Transforms that hold all records in memory."""

REFUSED = {
    **dict.fromkeys(
        ("map", "filter", "with_transform", "set_transform"),
        (
            "it takes a function, and nothing that a configuration names is executed",
            "Prepare the records with a script, and read what it writes",
        ),
    ),
    "train_test_split": (
        "it makes two data sets out of one",
        "Write split: train[:90%] in train_dataset and split: train[90%:] in eval_dataset",
    ),
    "batch": ("records are put into batches by the trainer", "Set runner_config.batch_size"),
    "class_encode_column": ("only text is read", "Remove it"),
    "cast": ("only text is read", "Remove it"),
    "cast_column": ("only text is read", "Remove it"),
    "unique": ("it makes a list of values", "Prepare the records with a script"),
    "flatten_indices": ("records have no indices that could be flattened", "Remove it"),
    "repeat": ("runner_config.epochs repeats the data", "Set runner_config.epochs"),
    "with_format": ("records are plain values", "Remove it"),
    "set_format": ("records are plain values", "Remove it"),
}
"""Methods of `datasets.Dataset` that are no transforms: why, and what to do instead."""


@dataclass(frozen=True)
class WrongTransform:
    """What is wrong with one entry; `key` is below it (`type`, `n`, or empty)."""

    key: str
    rule: str
    nearest: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Transform:
    """One step with all its arguments."""

    type: str
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


def parse_transform(entry: Any) -> Transform | list[WrongTransform]:
    """The step of one entry of `transforms`, or everything that is wrong with it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        return [WrongTransform("", "a step is a section with the key `type`", _known())]
    kind = entry["type"]
    if kind in REFUSED:
        why, advice = REFUSED[kind]
        return [WrongTransform("type", f"{kind} is not a step: {why}", "", advice)]
    if kind not in TRANSFORMS:
        near = did_you_mean(kind, [*TRANSFORMS, *REFUSED])
        return [WrongTransform("type", "there is no such step", near or _known())]
    known = TRANSFORMS[kind]
    given = {name: value for name, value in entry.items() if name != "type"}
    wrong = [
        WrongTransform(
            name, f"not an argument of {kind}",
            did_you_mean(name, known) or f"Its arguments: {', '.join(known)}",
        )
        for name in given if name not in known
    ]  # fmt: skip
    values = {}
    for name, argument in known.items():
        value = values[name] = given.get(name, argument.default)
        if value is REQUIRED:
            wrong.append(WrongTransform("", f"{kind} requires the argument `{name}`"))
        elif not _KINDS[argument.kind][0](value):
            wrong.append(WrongTransform(name, f"must be {_KINDS[argument.kind][1]}"))
    return wrong or _consistent(Transform(kind, values))


def _consistent(step: Transform) -> Transform | list[WrongTransform]:
    if step.type == "shard" and step["index"] >= step["num_shards"]:
        count = step["num_shards"]
        return [
            WrongTransform("index", f"must be below num_shards = {count}", f"Nearest: {count - 1}")
        ]
    if step.type == "sort" and isinstance(step["reverse"], list):
        columns = columns_of(step)
        if len(step["reverse"]) != len(columns):
            rule = f"must have one value for each of {len(columns)} column(s), or be one value"
            return [WrongTransform("reverse", rule)]
    return step


def columns_of(step: Transform) -> list[str]:
    """The columns that a step needs records to have."""
    if step.type == "rename_column":
        return [step["original_column_name"]]
    if step.type == "rename_columns":
        return list(step["column_mapping"])
    names = step.arguments.get("column_names", [])
    return [names] if isinstance(names, str) else list(names)


def _known() -> str:
    return f"Steps: {', '.join(TRANSFORMS)}"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_names(value: Any) -> bool:
    return _is_name(value) or (
        isinstance(value, list) and bool(value) and all(map(_is_name, value))
    )


def _are_switches(value: Any) -> bool:
    return type(value) is bool or (
        isinstance(value, list) and bool(value) and all(type(item) is bool for item in value)
    )


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _is_mapping(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(_is_name(old) and _is_name(new) for old, new in value.items())
        and len(set(value.values())) == len(value)
    )


_KINDS = {
    "a count": (_is_count, "an integer, 0 or more"),
    "a positive count": (lambda value: _is_count(value) and value > 0, "an integer above 0"),
    "a switch": (lambda value: type(value) is bool, "true or false"),
    "switches": (_are_switches, "true or false, or one for each column"),
    "indices": (_are_indices, "a list of integers, 0 or more"),
    "a column": (_is_name, "the name of a column"),
    "columns": (_are_names, "the name of a column, or a list of names"),
    "a mapping": (_is_mapping, "a section `old name: new name`, with new names that differ"),
}
