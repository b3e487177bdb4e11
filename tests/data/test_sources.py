"""What the data loaders read from real files, and their errors."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataLoaderSection
from launcher.data.conversations import Conversation
from launcher.data.loaders import read_samples, source_files
from launcher.data.tally import Tally
from launcher.errors import UserError


def read(tmp_path: Path, tally: Tally | None = None, **settings: Any) -> list[str]:
    loader = DataLoaderSection(**settings)
    cache = tmp_path / "cache"
    found = read_samples(loader, source_files(loader), cache, tally or Tally())
    return [document.text for document in found]


def talk(tmp_path: Path, **settings: Any) -> list[Conversation]:
    loader = DataLoaderSection(type="InstructionDataLoader", **settings)
    return list(read_samples(loader, source_files(loader), tmp_path / "cache", Tally()))


def write_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


# Text


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for name in (
        "b.txt",
        "a.md",
        "sub/c.py",
        "sub/sub/d.TXT",
        "data.csv",
        ".hidden/e.txt",
        ".f.txt",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_a_folder_is_read_sorted_with_its_folders(tmp_path: Path, texts: Path) -> None:
    assert read(tmp_path, dataset_dir=str(texts)) == ["a.md", "b.txt", "sub/c.py", "sub/sub/d.TXT"]


@pytest.mark.parametrize(
    ("place", "suffixes", "expected"),
    [
        ("", [".txt"], ["b.txt", "sub/sub/d.TXT"]),
        ("", ["txt"], ["b.txt", "sub/sub/d.TXT"]),
        ("", ["*.csv"], ["data.csv"]),
        ("data.csv", None, ["data.csv"]),
        ("*.*", None, ["a.md", "b.txt", "data.csv"]),
        ("*.*", [".md"], ["a.md"]),
        ("sub*", None, ["sub/c.py", "sub/sub/d.TXT"]),
        ("**/*.py", None, ["sub/c.py"]),
    ],
)
def test_files_folders_globs(
    tmp_path: Path, texts: Path, place: str, suffixes: list[str] | None, expected: list[str]
) -> None:
    assert read(tmp_path, dataset_dir=str(texts / place), suffixes=suffixes) == expected


def test_several_places_keep_their_order_and_no_file_comes_twice(
    tmp_path: Path, texts: Path
) -> None:
    places = [str(texts / "b.txt"), str(texts)]
    assert read(tmp_path, dataset_files=places)[:3] == ["b.txt", "a.md", "sub/c.py"]


def test_links_in_a_circle_end(tmp_path: Path, texts: Path) -> None:
    (texts / "sub" / "again").symlink_to(texts, target_is_directory=True)
    (texts / "sub" / "self").symlink_to(texts / "sub" / "self")
    (texts / "zlink").symlink_to(texts / "sub" / "sub", target_is_directory=True)
    assert read(tmp_path, dataset_dir=str(texts)) == ["a.md", "b.txt", "sub/c.py", "sub/sub/d.TXT"]


def test_undecodable_bytes_are_replaced_and_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and \xff")
    (tmp_path / "b.txt").write_bytes("\ufeffwith a mark, caf\u00e9 \ufffd".encode())
    (tmp_path / "c.txt").write_bytes(b" \n")
    tally = Tally()
    assert read(tmp_path, tally, dataset_dir=str(tmp_path)) == [
        "caf\ufffd and \ufffd",
        "with a mark, caf\u00e9 \ufffd",
    ]
    assert tally.warnings() == [
        "warning: 1 file(s) are not valid UTF-8: 2 character(s) were replaced by U+FFFD; "
        f"the first file is {tmp_path}/a.txt (line 1, offset 3)",
        "note: 1 empty document(s) were left out",
    ]


def test_num_samples_counts_documents_with_text(tmp_path: Path) -> None:
    for number, text in enumerate(["", "one", "two", "three"]):
        (tmp_path / f"{number}.txt").write_text(text)
    assert read(tmp_path, dataset_dir=str(tmp_path), num_samples=2) == ["one", "two"]


# JSON lines, JSON, Parquet


def test_json_lines_json_and_parquet_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "data"
    write_lines(folder / "a.jsonl", {"text": "one", "id": 1}, "", {"text": "two", "id": "x"})
    (folder / "b.json").write_text(json.dumps([{"text": "three"}, {"text": None}]))
    table = pyarrow.table({"other": [1, 2], "text": ["four", "five"]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "six"}\n')
    (folder / "e.jsonl").write_text("")
    write_lines(folder / "f.json", {"text": "seven"}, {"text": "eight"})
    tally = Tally()
    assert read(tmp_path, tally, type="HFDataLoader", dataset_dir=str(folder)) == [
        *("one", "two", "three", "four", "five", "six", "seven", "eight")
    ]
    assert len(tally.records_without_text) == 1


def test_the_library_is_kept_off_the_network_and_inside_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one"]}), path)
    before = (
        set((Path.home() / ".cache").rglob("*")) if (Path.home() / ".cache").exists() else set()
    )
    assert read(tmp_path, type="CommonDataLoader", data_files=str(path), text_column="body") == [
        "one"
    ]
    after = set((Path.home() / ".cache").rglob("*")) if (Path.home() / ".cache").exists() else set()
    assert {p for p in after - before if "datasets" in str(p)} == set()


def test_columns_that_change_their_type_do_not_matter(tmp_path: Path) -> None:
    """A library that derives one schema from the first records gives up here."""
    many = [{"text": f"t{n}", "meta": {"a": 1}} for n in range(3)]
    path = write_lines(tmp_path / "a.jsonl", *many, {"text": "last", "meta": [1, {"b": "c"}]})
    assert read(tmp_path, type="HFDataLoader", dataset_dir=str(path)) == ["t0", "t1", "t2", "last"]


def test_the_split_chooses_files_of_a_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "test"  # the folder's own name does not count
    train = write_lines(folder / "train-00000-of-00001.jsonl", {"text": "train"})
    test = write_lines(folder / "my_test.jsonl", {"text": "test"})
    assert read(tmp_path, type="HFDataLoader", dataset_dir=str(folder)) == ["train"]
    assert read(tmp_path, type="HFDataLoader", dataset_dir=str(folder), split="test") == ["test"]
    assert read(tmp_path, type="HFDataLoader", dataset_dir=str(test)) == ["test"]
    train.rename(folder / "one.jsonl")
    test.rename(folder / "two.jsonl")
    assert read(tmp_path, type="HFDataLoader", dataset_dir=str(folder)) == ["train", "test"]


# Instruction data

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
ALPACA = {"instruction": "Why?", "input": "", "output": "Because."}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
}
MESSAGES = {"messages": [QUESTION, ANSWER]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ALPACA, [QUESTION, ANSWER]),
        ({**ALPACA, "input": "More."}, [{**QUESTION, "content": "Why?\n\nMore."}, ANSWER]),
        ({**ALPACA, "system": "Be brief."}, [SYSTEM, QUESTION, ANSWER]),
        (MESSAGES, [QUESTION, ANSWER]),
        ({"messages": [SYSTEM, {**QUESTION, "name": None}, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        (SHAREGPT, [QUESTION, ANSWER]),
        ({**SHAREGPT, "system": "Be brief."}, [SYSTEM, QUESTION, ANSWER]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_formats_are_detected(
    tmp_path: Path, record: dict[str, Any], expected: list[dict[str, str]], suffix: str
) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_lines(path, record, record)
    elif suffix == "json":
        path.write_text(json.dumps([record, record], indent=1))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, record]), path)
    found = talk(tmp_path, dataset_files=[str(path)])
    assert [one.messages for one in found] == [expected, expected]
    wheres = {"jsonl": f"{path}:2"}
    assert found[1].where == wheres.get(suffix, f"{path}, record 2")


def test_tools_reach_the_template(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {**MESSAGES, "tools": '[{"name": "f"}]'})
    assert talk(tmp_path, dataset_dir=str(path))[0].tools == [{"name": "f"}]


def test_num_samples_stops_reading(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", MESSAGES, MESSAGES, "broken")
    assert len(talk(tmp_path, dataset_dir=str(path), num_samples=2)) == 2


# Errors

HF = {"type": "HFDataLoader"}
CHAT = {"type": "InstructionDataLoader"}


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        (
            {},
            {},
            "data_loader.dataset_dir is not set: TextDataLoader needs to know which files to read. "
            "Give a file, a folder or a glob.",
        ),
        ({}, CHAT, "data_loader.dataset_files is not set: InstructionDataLoader needs"),
        (
            {"corpus/a.txt": "x"},
            {"dataset_dir": "{}/corpsu"},
            "data_loader: '{}/corpsu' does not exist: dataset_dir and dataset_files must be a "
            "file, a folder or a glob. did you mean `corpus`? Relative paths are resolved",
        ),
        (
            {"corpus/a.txt": "x"},
            {"dataset_dir": "{}/far/off"},
            "data_loader: '{}/far/off' does not exist: dataset_dir and dataset_files must be a "
            "file, "
            "a folder or a glob. The part that exists is {}. Relative paths",
        ),
        (
            {"a.bin": "x", "b.bin": "x", "c": "x"},
            {"dataset_dir": "{}", "suffixes": [".txt", ".md"]},
            "data_loader: '{}' has no file ending in .txt, .md: a dataset needs at least one file. "
            "Found instead: 2 *.bin, 1 no suffix. Set data_loader.suffixes, or a data_loader.type",
        ),
        (
            {"a.txt": "x"},
            {**HF, "dataset_dir": "{}"},
            "Found instead: 1 *.txt. Text files are read by TextDataLoader.",
        ),
        (
            {".hidden": "x"},
            {"dataset_dir": "{}"},
            "data_loader: '{}' has no file: a dataset needs at least one file.",
        ),
        ({"a.txt": "x"}, {"dataset_dir": "{}/*.md"}, "data_loader: '{}/*.md' has no file"),
        (
            {"a.txt": None},
            {"dataset_dir": "{}"},
            "{}/a.txt: cannot be read (No such file or directory): every file of a dataset must be "
            "readable. Check the file, or remove it from the dataset.",
        ),
        (
            {"a.jsonl": '{"text": "one"}\n\n{"text": "two", oops}\n'},
            {**HF, "dataset_dir": "{}"},
            "{}/a.jsonl:3: is not JSON (Expecting property name enclosed in double quotes, column "
            '17): {"text": "two", oops}: every record must be one JSON object.',
        ),
        (
            {"a.jsonl": '{"text": "one"}\n{"text": "tw'},
            {**HF, "dataset_dir": "{}"},
            "{}/a.jsonl:2: is not JSON (Unterminated string starting at, column 10)",
        ),
        (
            {"a.jsonl": b'{"text": "one"}\n{"text": "caf\xe9"}\n'},
            {**HF, "dataset_dir": "{}"},
            "{}/a.jsonl:2: is not JSON (not UTF-8, column 14)",
        ),
        (
            {"a.jsonl": '{"text": "one"}\n["text"]\n'},
            {**HF, "dataset_dir": "{}"},
            '{}/a.jsonl:2: is a list: ["text"]: every record must be a JSON object.',
        ),
        (
            {"a.json": '[{"text": "one"},\n {"text": }]'},
            {**CHAT, "dataset_dir": "{}"},
            "{}/a.json:2: is not JSON (Expecting value, column 11)",
        ),
        (
            {"a.json": '{\n"text": "one"\n}'},
            {**CHAT, "dataset_dir": "{}"},
            "{}/a.json: is one JSON object: a JSON dataset is a list of objects, or has one "
            "object per line.",
        ),
        (
            {"a.jsonl": '{"body": "one", "id": 1}\n'},
            {**HF, "dataset_dir": "{}"},
            "{}/a.jsonl:1: there is no column 'text': HFDataLoader reads its documents from "
            "data_loader.text_column. Columns found: body, id.",
        ),
        (
            {"a.jsonl": '{"texts": "one", "id": 1}\n'},
            {**HF, "dataset_dir": "{}"},
            "did you mean `texts`? Columns found: texts, id.",
        ),
        (
            {"a.jsonl": '{"text": 5, "body": "one"}\n'},
            {**HF, "dataset_dir": "{}"},
            "{}/a.jsonl:1: column 'text' = 5: a document must be a string. Columns with "
            "text: body. Set data_loader.text_column.",
        ),
        (
            {"a.parquet": "no parquet at all"},
            {**HF, "dataset_dir": "{}"},
            "it is read with the `datasets` library, which must know its types.",
        ),
        (
            {"test.jsonl": "{}"},
            {**HF, "dataset_dir": "{}"},
            "data_loader.split = 'train': none of 1 file(s) has it in its name: a file in a folder "
            "belongs to the split that is a word of its name. Splits found: test.",
        ),
        (
            {"a.jsonl": '{"question": "one"}\n'},
            {**CHAT, "dataset_dir": "{}"},
            "{}/a.jsonl:1: has the keys question: instruction data is alpaca (instruction, input, "
            "output), messages (messages: role, content) or sharegpt (conversations: from, value).",
        ),
        (
            {"a.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n{"messages": []}\n'},
            {**CHAT, "dataset_dir": "{}"},
            "{}/a.jsonl:2: 'messages' = []: in the messages format it must be a list of turns "
            "that is not empty. Keys found: messages. Fix the record, or set data_loader.format",
        ),
        (
            {"a.jsonl": json.dumps(ALPACA)},
            {**CHAT, "dataset_dir": "{}", "format": "sharegpt"},
            "{}/a.jsonl:1: 'conversations' is missing: in the sharegpt format it must be a list",
        ),
        (
            {"a.jsonl": json.dumps({**ALPACA, "output": 5})},
            {**CHAT, "dataset_dir": "{}"},
            "{}/a.jsonl:1: 'output' = 5: in the alpaca format it must be a string.",
        ),
        (
            {"a.jsonl": '{"conversations": [{"from": "humman", "value": "x"}]}'},
            {**CHAT, "dataset_dir": "{}"},
            "{}/a.jsonl:1: has a turn from 'humman': a sharegpt turn is from one of system, human, "
            "user, gpt, chatgpt, assistant, bot, model, function_call, observation, tool, "
            "function. did you mean `human`?",
        ),
        (
            {"a.jsonl": json.dumps(ALPACA)},
            {**CHAT, "dataset_dir": "{}", "format": "alpacca"},
            "data_loader.format = 'alpacca': it must be one of alpaca, messages, sharegpt. did you "
            "mean `alpaca`? Leave it out to detect it.",
        ),
    ],
)
def test_errors_have_place_rule_and_advice(
    tmp_path: Path,
    files: dict[str, str | bytes | None],
    settings: dict[str, Any],
    expected: str,
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.symlink_to(root / "nowhere")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    filled = {
        key: value.replace("{}", str(root)) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    reader = read
    if filled.get("type") == "InstructionDataLoader":
        del filled["type"]
        reader = talk  # type: ignore[assignment]
    with pytest.raises(UserError) as caught:
        reader(tmp_path, **filled)
    assert expected.replace("{}", str(root)) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path, dataset_dir=str(path))


def test_without_the_library_the_error_has_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'slipway\[data\]'"):
        read(tmp_path, type="HFDataLoader", dataset_dir=str(path))
