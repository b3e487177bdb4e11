"""Random damage to files of records: values, names, nesting, encodings, whole files."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Kiel"}}}
RECORDS: dict[str, dict[str, Any]] = {
    "alpaca": {
        "instruction": "What is a slipway?",
        "input": "Of a yard.",
        "output": "A ramp for ships.",
        "system": "Be brief.",
        "history": [["Who?", "A ship."], ["When?", "At high tide."]],
        "id": "a-1",
    },
    "messages": {
        "messages": [
            {"role": "system", "content": "Answer in English."},
            {"role": "user", "content": "How high?", "weight": 0},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3 metres", "name": "tide"},
            {"role": "assistant", "content": "Three metres.", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "tide", "description": "heights"}}],
        "source": "harbour",
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Where to?"},
            {"from": "gpt", "value": "Into the sea.", "train": False},
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": "Abroad."},
        ],
        "system": "Be kind.",
        "idx": 7,
    },
}

RAW = "\x00raw:"
"""Prefix of a string that is written into the JSON verbatim."""
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 2.5e300, "", " ", "text", "0", "true", "\ud83d", "a\udc00"),
    *([], {}, [None], [1, "a"], {"a": {"b": [1]}}, [["q", "a"]], [["q"]], [{"role": "user"}]),
    *(
        "2024-01-02",
        "2024-01-02T10:00:00Z",
        "\u0000",
        "\u2028",
        "x" * 5000,
        "<|im_end|>",
        "{{ 1 }}",
    ),
    *(
        RAW + "NaN",
        RAW + "-Infinity",
        RAW + "9" * 5000,
        RAW + "1e999",
        RAW + "[" * 3000 + "]" * 3000,
    ),
    *(RAW + '{"a":' * 600 + "1" + "}" * 600, RAW + '{"a": 1, "a": 2}', RAW + "", RAW + "tru"),
    *(RAW + '"\\ud800\\u0041"', RAW + '"\\x"', RAW + '"line\nbreak"'),
]
NAMES = [
    *("weight", "train", "loss", "loss_weight", "system", "tools", "history", "input", "messages"),
    *("conversations", "instruction", "output", "chosen", "rejected", "label", "images", "audio"),
    *("tool_calls", "function_call", "reasoning_content", "name", "role", "content", "from"),
    *("value", "sytem", "Weight", "foo", "", "\ud83d", "a b", "id", "source", "metadata", "text"),
]
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson", ".parquet")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a value with each of its keys or indices."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _objects(value: Any) -> list[dict[str, Any]]:
    found = [owner[key] for owner, key in _places(value) if isinstance(owner[key], dict)]
    return [value, *found]


def _replace(record: Any, choose: random.Random) -> None:
    owner, key = choose.choice(list(_places(record)))
    owner[key] = copy.deepcopy(choose.choice(VALUES))


def _remove(record: Any, choose: random.Random) -> None:
    owner, key = choose.choice(list(_places(record)))
    del owner[key]


def _rename(record: Any, choose: random.Random) -> None:
    owner = choose.choice([found for found in _objects(record) if found])
    owner[choose.choice(NAMES)] = owner.pop(choose.choice(list(owner)))


def _add(record: Any, choose: random.Random) -> None:
    owner = choose.choice(_objects(record))
    owner[choose.choice(NAMES)] = copy.deepcopy(choose.choice(VALUES))


def _swap(record: Any, choose: random.Random) -> None:
    places = list(_places(record))
    (one, left), (other, right) = choose.choice(places), choose.choice(places)
    one[left], other[right] = copy.deepcopy(other[right]), copy.deepcopy(one[left])


def _nest(record: Any, choose: random.Random) -> None:
    owner, key = choose.choice(list(_places(record)))
    owner[key] = choose.choice([lambda v: [v], lambda v: {"a": v}, lambda v: [v, v]])(owner[key])


CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    *(_replace, _replace, _remove, _rename, _add, _add, _swap, _nest),
)


def _flip(content: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(content))
    return content[:place] + bytes([choose.randrange(256)]) + content[place + 1 :]


def _insert(content: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(content))
    piece = choose.choice([b"\xe9", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"]", b"}{"])
    return content[:place] + piece + content[place:]


ENCODINGS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    lambda content, choose: content[: choose.randrange(len(content))],
    _flip,
    _insert,
    lambda content, _: b"\xef\xbb\xbf" + content,
    lambda content, _: content.decode().encode("utf-16"),
    lambda content, _: content.decode().encode("utf-32"),
    lambda content, _: content.decode().encode("utf-16-le"),
    lambda content, _: ("\u00e9" + content.decode()).encode("latin-1", errors="replace"),
    lambda content, _: content.replace(b"\n", b"\r\n"),
    lambda content, _: content + content,
    lambda content, _: b"",
)


def to_json(value: Any) -> str:
    """JSON of a value, with its RAW strings verbatim."""
    text = json.dumps(value)
    mark = json.dumps(RAW)[1:-1]
    while mark in text:
        begin = text.index('"' + mark)
        piece, end = json.JSONDecoder().raw_decode(text, begin)
        text = text[:begin] + piece.removeprefix(RAW) + text[end:]
    return text


def write(path: Path, records: list[Any], choose: random.Random) -> str:
    """Write records in the format of the suffix of `path`, `as it is` or with other bytes
    (`changed`). Returns an empty string where the format cannot represent them."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            plain = json.loads("[" + ",".join(map(to_json, records)) + "]")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), path)
        except (ValueError, RecursionError, pyarrow.ArrowException, TypeError, OverflowError):
            return ""
        return "changed"  # Parquet has one type a column
    lines = [to_json(record) for record in records]
    is_list = ".json." in f"{path.name}."
    written = (f"[{', '.join(lines)}]" if is_list else "\n".join(lines) + "\n").encode()
    content = written
    if choose.random() < 0.3:
        content = choose.choice(ENCODINGS)(content, choose)
    is_changed = content != written
    if path.suffix == ".gz":
        content = gzip.compress(content)
        if choose.random() < 0.2:
            content, is_changed = choose.choice(ENCODINGS[:3])(content, choose), True
    path.write_bytes(content)
    return "changed" if is_changed else "as it is"


def mutated(seed: int) -> tuple[str, str, list[Any], random.Random]:
    """Form, suffix, and three records of which the middle one is changed."""
    choose = random.Random(seed)
    form = choose.choice(list(RECORDS))
    record = copy.deepcopy(RECORDS[form])
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        if record:
            choose.choice(CHANGES)(record, choose)
    return form, choose.choice(SUFFIXES), [RECORDS[form], record, RECORDS[form]], choose
