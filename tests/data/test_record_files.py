"""Files of records: formats, folders that `datasets` saved, splits and their slices."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.schema import DataLoaderSection
from launcher.data.loaders import read_samples, source_files
from launcher.data.records import convert_records
from launcher.data.tables import read_table_records
from launcher.data.tally import Tally
from launcher.errors import UserError

ROWS = [
    {"text": 'a "quoted" ship', "n": "1"},
    {"text": "two\nlines, and a comma", "n": "2"},
    {"text": "\U0001f6a2 ships\ttab", "n": "3"},
]


def read(folder: Path, tally: Tally | None = None, **settings: Any) -> list[str]:
    """The texts that HFDataLoader reads."""
    section = DataLoaderSection(type="HFDataLoader", **settings)
    tally = tally or Tally()
    found = read_samples(section, source_files(section), folder / "cache", tally)
    return [document.text for document in found]


def lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def table(path: Path, separator: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "n"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "separator", "encode"),
    [
        ("a.csv", ",", bytes),
        ("a.tsv", "\t", bytes),
        ("a.CSV.gz", ",", gzip.compress),
        ("a.csv", ",", lambda content: b"\xef\xbb\xbf" + content),
        ("a.csv", ",", lambda content: content.decode().encode("utf-16")),
        ("a.csv", ",", lambda content: content.replace(b"\r\n", b"\n") + b"\n\n"),
    ],
    ids=["csv", "tsv", "gz", "byte order mark", "utf-16", "blank lines"],
)
def test_tables(name: str, separator: str, encode: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(encode(table(tmp_path, separator)))
    found = read(tmp_path, path=str(tmp_path))
    assert [text.replace("\r", "") for text in found] == [row["text"] for row in ROWS]
    assert read(tmp_path, dataset_files=str(tmp_path / name), text_column="n") == ["1", "2", "3"]


def test_a_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text;n\na,b;1\n"c;d";2\n')
    assert read(tmp_path, path=str(tmp_path), delimiter=";") == ["a,b", "c;d"]


def test_a_long_field_and_an_empty_table(tmp_path: Path) -> None:
    long = "ship " * 50_000
    (tmp_path / "a.csv").write_text(f"text\n{long}\n")
    assert read(tmp_path, path=str(tmp_path)) == [long]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.csv").write_text("text\n")
    assert read(tmp_path, path=str(tmp_path / "b")) == []


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one ship\n\ntwo ships\r\nlast")
    assert read(tmp_path, path="text", data_files=str(tmp_path / "a.txt")) == [
        "one ship", "two ships", "last",
    ]  # fmt: skip


def test_a_format_reads_files_of_other_names(tmp_path: Path) -> None:
    lines(tmp_path / "records.data", ["a", "b"])
    lines(tmp_path / "other.txt", ["c"])
    assert read(tmp_path, path="json", data_files=str(tmp_path / "records.data")) == ["a", "b"]
    (tmp_path / "t.dat").write_text("text\nx\n")
    assert read(tmp_path, path="csv", data_dir=str(tmp_path), data_files="t.dat") == ["x"]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    train = datasets.Dataset.from_list([{"text": f"t{n}", "n": n} for n in range(7)])
    test = datasets.Dataset.from_list([{"text": None}, {"text": "e"}])
    train.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    texts = [f"t{n}" for n in range(7)]
    for key in ("path", "dataset_dir"):
        assert read(tmp_path, **{key: str(tmp_path / "one")}) == texts
        assert read(tmp_path, **{key: str(tmp_path / "two")}) == texts
    two = {"path": str(tmp_path / "two"), "load_func": "load_from_disk"}
    tally = Tally()
    assert read(tmp_path, tally, split="test", **two) == ["e"]
    assert tally.records_without_text.count == 1
    assert read(tmp_path, split="train[-2:]+test", **two) == ["t5", "t6", "e"]
    (shard,) = (tmp_path / "one").glob("data-00001-of-*.arrow")
    assert read(tmp_path, path="arrow", data_files=str(shard)) == ["t3", "t4"]


def test_both_formats_of_arrow_files(tmp_path: Path) -> None:
    import pyarrow

    content = pyarrow.table({"text": ["a", "b", "c"]})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", content.schema) as file:
        file.write_table(content, max_chunksize=2)
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", content.schema) as file:
        file.write_table(content, max_chunksize=2)
    assert read(tmp_path, path=str(tmp_path)) == ["a", "b", "c"] * 2


def test_places_below_a_folder(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    lines(hub / "zh" / "train-0.jsonl", ["z"])
    lines(hub / "en" / "train-0.jsonl", ["e"])
    lines(hub / "en" / "test-0.jsonl", ["t"])
    assert read(tmp_path, path=str(hub), subset="zh") == ["z"]
    assert read(tmp_path, path=str(hub), data_dir="en", split="test") == ["t"]
    assert read(tmp_path, path=str(hub), data_files=["zh/*.jsonl", "en/test-0.jsonl"]) == ["z", "t"]
    by_split = {"train": "zh/train-0.jsonl", "mine": ["en/*.jsonl"]}
    assert read(tmp_path, path=str(hub), data_files=by_split) == ["z"]
    assert read(tmp_path, path=str(hub), data_files=by_split, split="mine") == ["t", "e"]


SLICES = (
    *("train", "train[:3]", "train[4:]", "train[-3:]", "train[:-5]", "train[2:5]", "train[:100]"),
    *("train[10%:20%]", "train[:50%]", "train[-25%:]", "train[33%:66%]", "train[:15%]"),
    *("train+test", "train[:2]+test[1:]", "test+train[90%:]", "train[:1]+train[5:6]", "train[5:2]"),
)


@pytest.mark.parametrize("split", SLICES)
def test_slices_are_those_of_datasets(split: str, tmp_path: Path) -> None:
    import datasets

    lines(tmp_path / "d" / "train.jsonl", [f"a{n}" for n in range(6)])
    lines(tmp_path / "d" / "x" / "train.jsonl", [f"b{n}" for n in range(5)])
    lines(tmp_path / "d" / "test.jsonl", [f"t{n}" for n in range(3)])
    files = {"train": ["train.jsonl", "x/train.jsonl"], "test": "test.jsonl"}
    places = {name: [str(tmp_path / "d" / n) for n in ([v] if isinstance(v, str) else v)]
              for name, v in files.items()}  # fmt: skip

    def texts_of(path: str) -> list[str]:
        return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]

    texts = {name: [text for path in found for text in texts_of(path)]
             for name, found in places.items()}  # fmt: skip
    counts = {name: len(found) for name, found in texts.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(counts)
    expected = [text for part in parts for text in texts[part.splitname][part.from_ : part.to]]
    assert read(tmp_path, path=str(tmp_path / "d"), split=split) == expected
    assert read(tmp_path, path="json", data_files=places, split=split) == expected


WRONG: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "a field too many": ("a.csv", "text,n\na,1\nb,2,3\n", {}, ["a.csv:3", "3 field(s)", "2"]),
    "a field too few": ("a.csv", 'text,n\n"a\nb",1\nc\n', {}, ["a.csv:4", "1 field(s)"]),
    "an open quote": ("a.csv", 'text,n\na,1\n"b,2\nc,3\n', {}, ["a.csv:3", "not closed", "line 4"]),
    "text after a quote": ("a.csv", 'text\n"a"b\n', {}, ["a.csv:2", "after the closing quote"]),
    "a column twice": ("a.csv", "text,text\na,b\n", {}, ["a.csv:1", "'text' 2 times"]),
    "a column without name": ("a.csv", "text,\na,b\n", {}, ["a.csv:1", "column 2"]),
    "one column": ("a.csv", "text;n\na;1\n", {}, ["a.csv:2", 'delimiter: ";"']),
    "one mapped column": (
        "a.csv",
        "body|n\na|1\n",
        {"column_map": {"text": "body"}},
        ["a.csv:2", 'delimiter: "|"'],
    ),
    "semicolons": ("a.csv", "text;n\na,b;1\n", {}, ["a.csv:2", 'delimiter: ";"']),
    "latin 1": ("a.csv", "text\nsh\xefp\n", {"encoding": "latin1"}, ["a.csv:2", "offset 7"]),
    "another column": ("a.csv", "txet,n\na,1\n", {}, ["a.csv:2", "did you mean `txet`?"]),
    "a damaged gz": ("a.csv.gz", "no gzip", {}, ["a.csv.gz"]),
    "no arrow": ("a.arrow", "no arrow", {}, ["a.arrow", "Arrow"]),
    "another format": ("a.csv", "text\na\n", {"path": "json"}, ["path: csv"]),
    "no such split": ("train.csv", "text\na\n", {"split": "trian"}, ["Splits found: train"]),
    "tokens": ("a.json", '[{"input_ids": [1], "labels": [2]}]', {}, ["a.json, record 1", "tokens"]),
    "a wrong slice": ("a.csv", "text\na\n", {"split": "train[5]"}, ["`train[:5]`"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    name, content, settings, words = WRONG[case]
    settings = dict(settings)
    (tmp_path / name).write_text(content, encoding=settings.pop("encoding", "utf-8"))
    place = {"data_files": str(tmp_path / name)} if "path" in settings else {"path": str(tmp_path)}
    with pytest.raises(UserError) as error:
        read(tmp_path, **(place | settings))
    for word in words:
        assert word in str(error.value)


def test_several_wrong_rows_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\na\nb,2\nc\n")
    with pytest.raises(UserError) as error:
        read(tmp_path, path=str(tmp_path))
    assert [problem.where[-1] for problem in error.value.problems] == ["2", "4"]


DAMAGED: dict[str, tuple[str, str | None, str]] = {
    "no state": ("train/state.json", None, "does not exist"),
    "state is no JSON": ("train/state.json", "{", "not JSON"),
    "no files": ("train/state.json", "{}", "_data_files"),
    "an index": ("train/state.json", '{"_data_files": [{"filename": "a"}], "_indices_files": [1]}',
                 "index file"),
    "an entry without a name": ("train/state.json", '{"_data_files": [{"file": "a"}]}', "filename"),
    "an entry that is a name": ("train/state.json", '{"_data_files": ["a"]}', "filename"),
    "a file elsewhere": ("train/state.json", '{"_data_files": [{"filename": "../a"}]}', "filename"),
    "a file is missing": ("train/data-00000-of-00001.arrow", None, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders_of_datasets(case: str, tmp_path: Path) -> None:
    import datasets

    name, content, word = DAMAGED[case]
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(
        folder
    )
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError) as error:
        read(tmp_path, path=str(folder))
    assert name.rpartition("/")[2] in str(error.value)
    assert word in str(error.value)
    with pytest.raises(UserError, match="did you mean `train`"):
        read(tmp_path, path=str(folder), split="trian")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=6), sign=st.sampled_from(",\t;|"))
@settings(max_examples=150, deadline=None)
def test_what_a_csv_library_writes_is_read_back(rows: list[tuple[str, str]], sign: str) -> None:
    """Quotes, separators, line breaks of all kinds, and what looks like a header or a number."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=sign)
            writer.writerows([("one", "two"), *rows])
        found = convert_records(read_table_records(path, sign), lambda record: record.value)
        assert [(row["one"], row["two"]) for row in found] == rows
