"""Bytes, JSON and text of data files: read as they are, or refused with file, line and offset."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launcher.config.derived import read_json_object
from launcher.config.schema import DataLoaderSection
from launcher.data.loaders import read_samples, source_files
from launcher.data.tally import Tally
from launcher.errors import UserError

RECORD = {"instruction": "caf\u00e9 d\u00e9j\u00e0", "output": "na\u00efve \u4e2d \U0001f6a2"}


def read(
    path: Path, loader: str = "InstructionDataLoader", tally: Tally | None = None
) -> list[Any]:
    section = DataLoaderSection(type=loader, dataset_files=[str(path)], text_column="instruction")
    tally = tally or Tally()
    return list(read_samples(section, source_files(section), path.parent / "cache", tally))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def content_of(name: str, *records: Any) -> str:
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    return f"[{','.join(texts)}]" if ".json." in f"{name}." else "\n".join(texts) + "\n"


NAMES = ["d.json", "d.jsonl", "d.ndjson", "d.json.gz", "d.jsonl.gz"]
LOADERS = ["InstructionDataLoader", "HFDataLoader"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be mark"])
@pytest.mark.parametrize("name", NAMES)
def test_unicode_with_or_without_a_mark_is_read(tmp_path: Path, name: str, encoding: str) -> None:
    text = content_of(name, RECORD, RECORD)
    content = text.encode(encoding.removesuffix(" mark"))
    path = write(tmp_path / name, (b"\xfe\xff" if " mark" in encoding else b"") + content)
    for conversation in (found := read(path)):
        assert [turn["content"] for turn in conversation.messages] == list(RECORD.values())
    assert len(found) == 2
    assert [document.text for document in read(path, "HFDataLoader")] == [RECORD["instruction"]] * 2


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NAMES)
def test_latin_1_is_an_error_with_line_and_offset(tmp_path: Path, name: str, loader: str) -> None:
    latin = {"instruction": "caf\u00e9", "output": "na\u00efve"}
    text = content_of(name, {"instruction": "q", "output": "a"}, latin)
    path = write(tmp_path / name, text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read(path, loader)
    line = 1 if ".json." in f"{name}." else 2
    assert f"{path}:{line}: is not JSON (not UTF-8, column " in str(caught.value)
    offset = text.index("\u00e9")
    assert f"The byte is at offset {offset} of the file." in str(caught.value)


BAD_JSON = {
    "deep lists": (
        '{"output":"a","instruction":"q","x":' + "[" * 3000 + "]" * 3000 + "}",
        "nested",
    ),
    "deep objects": ('{"a":' * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "long number": ('{"instruction":"q","output":"a","id":' + "9" * 5000 + "}", "4300 digits"),
    "long negative": ('{"instruction":"q","output":"a","id":-' + "9" * 5000 + "}", "4300 digits"),
    "NaN": ('{"instruction":"q","output":"a","score":NaN}', "NaN is not a JSON value"),
    "Infinity": ('{"instruction":"q","output":"a","score":-Infinity}', "-Infinity is not"),
    "twice": ('{"instruction":"q","output":"a","output":"b"}', "duplicate key 'output'"),
    "twice inside": ('{"instruction":"q","output":"a","m":{"k":1,"k":1}}', "duplicate key 'k'"),
    "NUL byte": ('{"instruction":"q\0","output":"a"}', "Invalid control character"),
    "cut": ('{"instruction":"q","outp', "Unterminated string"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_cannot_be_read_has_file_and_line(
    tmp_path: Path, case: str, name: str, loader: str
) -> None:
    bad, reason = BAD_JSON[case]
    good = json.dumps({"instruction": "q", "output": "a"})
    text = f"[{good},\n{bad}]" if name == "d.json" else f"{good}\n{bad}\n"
    path = write(tmp_path / name, text.encode())
    with pytest.raises(UserError) as caught:
        read(path, loader)
    assert f"{path}:2: is not JSON (" in str(caught.value)
    assert reason in str(caught.value)
    if name == "d.json":
        assert "It is in record 2." in str(caught.value)


def test_wrong_lines_are_reported_together(tmp_path: Path) -> None:
    lines = [BAD_JSON["deep lists"][0], BAD_JSON["long number"][0], "[1]", json.dumps(RECORD), "{"]
    path = write(tmp_path / "d.jsonl", "\n".join(lines).encode())
    with pytest.raises(UserError) as caught:
        read(path)
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"{path}:{number}" for number in (1, 2, 3, 5)]
    path = write(tmp_path / "many.jsonl", b"{\n" * 100)
    with pytest.raises(UserError) as caught:
        read(path)
    assert len(caught.value.problems) == 10


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-9], "end-of-stream marker"),
        (lambda content: content[:20] + b"\xff\xff\xff" + content[23:], "rror"),
        (lambda content: b"x" + content, "Not a gzipped file"),
    ],
    ids=["cut", "other bytes", "no gzip"],
)
@pytest.mark.parametrize("name", ["d.json.gz", "d.jsonl.gz"])
def test_damaged_gzip_is_an_error_with_the_file(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = write(tmp_path / name, content_of(name, *[RECORD] * 50).encode())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{path}: cannot be read (" in str(caught.value)
    assert reason in str(caught.value)


HALF = '"q \\ud83d x"'


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (f'{{"instruction":{HALF},"output":"a"}}', "instruction"),
        (f'{{"instruction":"q","input":{HALF},"output":"a"}}', "input"),
        (f'{{"instruction":"q","output":"a","system":{HALF}}}', "system"),
        (f'{{"instruction":"q","output":"a","history":[["q",{HALF}]]}}', "history[0][1]"),
        (f'{{"instruction":"q","output":"a","tools":[{{"name":{HALF}}}]}}', "tools[0].name"),
        (f'{{"messages":[{{"role":"user","content":{HALF}}}]}}', "messages[0].content"),
        (
            f'{{"messages":[{{"role":"user","content":[{{"type":"text","text":{HALF}}}]}}]}}',
            "messages[0].content",
        ),
        (
            '{"messages":[{"role":"assistant","content":"","tool_calls":[{"name":"f","arguments":'
            f"{{{HALF}:1}}}}]}}]}}",
            "messages[0].tool_calls[0].arguments",
        ),
        (f'{{"conversations":[{{"from":"human","value":{HALF}}}]}}', "conversations[0].value"),
    ],
)
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_half_a_surrogate_pair_is_an_error_with_record_and_field(
    tmp_path: Path, record: str, field: str, name: str
) -> None:
    path = write(tmp_path / name, f"[{record}]".encode() if name == "d.json" else record.encode())
    with pytest.raises(UserError) as caught:
        read(path)
    place = f"{path}, record 1" if name == "d.json" else f"{path}:1"
    assert f"{place}: field '{field}' has \\ud83d, half of a surrogate pair" in str(caught.value)


def test_a_complete_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", b'{"instruction":"\\ud83d\\udea2","output":"a"}')
    assert read(path)[0].messages[0]["content"] == "\U0001f6a2"
    assert read(path, "HFDataLoader")[0].text == "\U0001f6a2"


def test_text_columns_are_checked_too(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", f'{{"instruction":{HALF}}}'.encode())
    with pytest.raises(UserError, match=r"d.jsonl:1: field 'instruction' has .ud83d"):
        read(path, "HFDataLoader")


# Columns that look like something else than text

LOOKS = [
    *("2024-01-01", "2024-01-02 10:00:00", "2024-01-02T10:00:00.5Z", "10:30", "007", "1e5", "true"),
    *("null", "NaN", "[1]", "P3D", " 2024-01-01", "2024-01-01\n"),
]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_text_that_looks_like_dates_or_numbers_is_the_text_in_the_file(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / name, content_of(name, *({"instruction": t} for t in LOOKS)).encode())
    assert [document.text for document in read(path, "HFDataLoader")] == LOOKS
    for look in LOOKS:  # a column of one kind alone is what a library takes for a type
        one = write(tmp_path / name, content_of(name, *[{"instruction": look}] * 3).encode())
        assert [document.text for document in read(one, "HFDataLoader")] == [look] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([datetime(2024, 1, 2)], "datetime.datetime(2024, 1, 2, 0, 0), which is a date and time"),
        ([date(2024, 1, 2)], "which is a date"),
        ([timedelta(1)], "which is a duration"),
        ([b"x"], "b'x', which is bytes"),
        ([5], "= 5: a document must be a string"),
        ([True], "= True"),
        ([["a"]], "= ['a']"),
        ([{"a": "b"}], "= {'a': 'b'}"),
    ],
)
def test_columns_of_parquet_that_are_not_text(
    tmp_path: Path, values: list[Any], message: str
) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    table = pyarrow.table({"instruction": [None, *values], "body": ["one", "two"]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError) as caught:
        read(path, "HFDataLoader")
    assert f"{path}, record 2: column 'instruction' = " in str(caught.value)
    assert message in str(caught.value)
    assert "Columns with text: body." in str(caught.value)


def test_text_of_parquet_that_looks_like_dates_stays_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": LOOKS}), path)
    assert [document.text for document in read(path, "HFDataLoader")] == LOOKS


def test_a_parquet_file_without_rows_is_an_empty_one(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, rows in (("a", []), ("b", ["the ship"])):
        table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    loader = DataLoaderSection(type="HFDataLoader", dataset_dir=str(tmp_path))
    found = read_samples(loader, source_files(loader), tmp_path / "cache", Tally())
    assert [document.text for document in found] == ["the ship"]


@pytest.mark.parametrize("reason", ["NaN is not a JSON value", "duplicate key 'output'"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_a_place_that_is_not_known_is_not_made_up(tmp_path: Path, name: str, reason: str) -> None:
    wrong = '"score": NaN' if "NaN" in reason else '"output": "b"'
    record = f'{{"instruction": "q", "output": "a", {wrong}}}'
    path = tmp_path / name
    path.write_text(f"[\n{record}\n]" if name == "d.json" else f"\n{record}\n")
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{path}:2: is not JSON ({reason}): {{" in str(caught.value)


def test_a_column_that_is_absent_is_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", b'{"body": "one"}\n' * 5)
    with pytest.raises(UserError, match="there is no column 'instruction'") as caught:
        read(path, "HFDataLoader")
    assert len(caught.value.problems) == 1


def test_text_of_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    offsets = pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0\6\0\0\0")
    texts = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"onet\xe9o"))
    pyarrow.parquet.write_table(pyarrow.table({"instruction": texts}), tmp_path / "d.parquet")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "d.parquet", "HFDataLoader")
    message = "d.parquet, record 2: has a string that is not UTF-8 (byte 0xe9 at its offset 1)"
    assert message in str(caught.value)


def test_files_whose_names_are_not_utf_8_are_read(tmp_path: Path) -> None:
    path = tmp_path / b"caf\xe9.jsonl".decode(errors="surrogateescape")
    tally = Tally()
    assert len(read(write(path, json.dumps(RECORD | {"foo": 1}).encode()), tally=tally)) == 1
    assert "`foo` (1, first in " in tally.warnings()[0]


# Text files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_files_with_a_mark_are_read(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "a.txt", "caf\u00e9\n\U0001f6a2".encode(encoding))
    tally = Tally()
    assert read(path, "TextDataLoader", tally)[0].text == "caf\u00e9\n\U0001f6a2"
    assert tally.warnings() == []


def test_text_files_that_are_not_text_are_counted(tmp_path: Path) -> None:
    tally = Tally()
    read(write(tmp_path / "a.txt", b"one\ntwo caf\xe9"), "TextDataLoader", tally)
    read(write(tmp_path / "b.txt", "text".encode("utf-16-le")), "TextDataLoader", tally)
    assert tally.warnings() == [
        "warning: 1 file(s) are not valid UTF-8: 1 character(s) were replaced by U+FFFD; "
        f"the first file is {tmp_path}/a.txt (line 2, offset 11)",
        "warning: 1 file(s) have the character U+0000, as binary files do; "
        f"the first is {tmp_path}/b.txt",
    ]


# JSON of a model's folder


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('{"a":\n' + "[" * 3000, ":2", "nested too deeply"),
        ('{\n"a":\n' + "9" * 5000 + "}", ":3", "a number of more than 4300 digits"),
        ('{\n"a": "12\\"3", tru}', ":2", "Expecting property name"),
        ("[" * 3000, ":1", "nested too deeply"),
    ],
)
def test_json_of_a_model_that_cannot_be_read(
    tmp_path: Path, text: str, place: str, reason: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json_object(path)
    assert f"{path}{place}: this is not valid JSON: {reason}" in str(caught.value)
