"""tokenize: the documents of the loaders, as a Megatron dataset, whatever happens on the way."""

from __future__ import annotations

import fcntl
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data import tokenized_corpus
from launcher.data.megatron.indexed import open_indexed
from launcher.tools import tokenize
from tests.data.conftest import train_tokenizer
from tests.data.mindrecord_writer import Schema, write_mindrecord

TEXTS = [f"The ship {number} slides down the slipway. " * (number % 5 + 1) for number in range(60)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    train_tokenizer().save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"text": text, "body": f"{text}!"}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "texts.json").write_text(json.dumps([json.loads(line) for line in lines]))
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "texts.parquet", row_group_size=7)
    (tmp_path / "books").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "books" / f"{number:03d}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return tokenize.main(
        ["--tokenizer", "tokenizer", "--output_prefix", "out/all_document", *arguments]
    )


def documents() -> list[list[int]]:
    opened = open_indexed("out/all_document")
    opened.check()
    return [opened.document(index).tolist() for index in range(opened.documents)]


def expected(suffix: str = "") -> list[list[int]]:
    tokenizer: Any = train_tokenizer()
    end = [tokenizer.eos_token_id]
    return [tokenizer(text + suffix, add_special_tokens=False)["input_ids"] + end for text in TEXTS]


@pytest.mark.parametrize(
    ("arguments", "suffix"),
    [
        (["--input", "texts.jsonl"], ""),
        (["--input", "texts.json", "--text_column", "body"], "!"),
        (["--input", "texts.jsonl.gz"], ""),
        (["--input", "texts.parquet"], ""),
        (["--input", "books"], ""),
        (["--input", "books/*.txt", "--type", "TextDataLoader", "--dtype", "int32"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_document_is_kept(folder: Path, arguments: list[str], suffix: str) -> None:
    assert run(*arguments) == 0
    assert documents() == expected(suffix)
    wide = "int32" in arguments
    assert open_indexed("out/all_document").header.dtype == ("int32" if wide else "uint16")
    assert not Path("out/all_document.parts").exists()


def test_rows_of_mindrecord_files(folder: Path) -> None:
    rows = [np.arange(number, number + 9, dtype=np.int32) for number in range(50)]
    schema: Schema = {"ids": ("int32", [-1]), "labels": ("int32", [-1])}
    records = [{"ids": row, "labels": row} for row in rows]
    write_mindrecord(folder / "a.mindrecord", schema, records, shards=3)
    arguments = ["--input", "a.mindrecord0", "--output_prefix", "out/all_document"]
    assert tokenize.main([*arguments, "--column", "ids"]) == 0
    assert sorted(documents()) == [row.tolist() for row in rows]


class Killed(Exception):
    """Stands for a process that ends."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_run_goes_on_after_the_last_complete_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], after: int
) -> None:
    monkeypatch.setattr(tokenized_corpus, "PART_TOKENS", 300)
    monkeypatch.setattr("launcher.data.tokens.BATCH_CHARACTERS", 300)
    real, asked = tokenize._batches, []

    def dies(*arguments: Any) -> Iterator[list[Any]]:
        asked.append(arguments[2])
        for number, batch in enumerate(real(*arguments)):
            if len(asked) == 1 and number == 4 * after:
                raise Killed
            yield batch

    monkeypatch.setattr(tokenize, "_batches", dies)
    with pytest.raises(Killed):
        run("--input", "texts.jsonl")
    assert not Path("out/all_document.idx").exists()
    assert run("--input", "texts.jsonl") == 0
    assert asked[0] == 0 < asked[1] < len(TEXTS)
    assert f"continued after {asked[1]} documents" in capsys.readouterr().out
    assert documents() == expected()


def test_parts_of_another_job_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_corpus, "PART_TOKENS", 300)
    monkeypatch.setattr("launcher.data.tokens.BATCH_CHARACTERS", 300)
    real = tokenized_corpus._verify

    def dies(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr(tokenized_corpus, "_verify", dies)
    with pytest.raises(Killed):
        run("--input", "texts.json", "--text_column", "body")
    monkeypatch.setattr(tokenized_corpus, "_verify", real)
    assert run("--input", "texts.jsonl", "--overwrite") == 0
    assert documents() == expected()


def test_a_damaged_part_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_corpus, "PART_TOKENS", 300)
    monkeypatch.setattr("launcher.data.tokens.BATCH_CHARACTERS", 300)
    real = tokenized_corpus.IndexedWriter.append_dataset

    def dies(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr(tokenized_corpus.IndexedWriter, "append_dataset", dies)
    with pytest.raises(Killed):
        run("--input", "texts.jsonl")
    part = Path("out/all_document.parts/part-00001.bin")
    part.write_bytes(part.read_bytes()[:-4])
    monkeypatch.setattr(tokenized_corpus.IndexedWriter, "append_dataset", real)
    assert run("--input", "texts.jsonl") == 0
    assert documents() == expected()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "texts.jsnl"], "texts.jsonl"),
        (["--input", "texts.jsonl", "--text_column", "txt"], "text"),
        (["--input", "texts.jsonl", "--text_colum", "text"], "--text_column"),
        (["--input", "texts.jsonl", "--tokenizer", "books"], "tokenizer.json"),
        (["--input", "texts.jsonl", "--workers", "0"], "--workers"),
        (["--input", "texts.jsonl", "books"], "--type"),
        (["--input", "books", "--text_column", "body"], "--text_column"),
        (["--input", "texts.jsonl", "--column", "text"], "--column"),
        (["--input", "empty.txt"], "no documents"),
        (["--input", "tokens.npy"], "a file of tokens"),
        (["--input", "texts.jsonl", "--output_prefix", "out"], "out/text_document"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("empty.txt").touch()
    np.save("tokens.npy", np.zeros(4, dtype=np.uint16))
    Path("out").mkdir()
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(Path().glob("**/*.bin"))
    assert not list(Path("out").iterdir())


def test_bytes_that_changed_on_the_disk_are_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tokenized_corpus.IndexedWriter.append_dataset

    def flips_a_bit(writer: Any, path: Path) -> None:
        tokens = path.with_suffix(".bin")
        content = bytearray(tokens.read_bytes())
        content[10] ^= 1
        tokens.write_bytes(content)
        real(writer, path)

    monkeypatch.setattr(tokenized_corpus.IndexedWriter, "append_dataset", flips_a_bit)
    assert run("--input", "texts.jsonl") == 2
    assert "all_document.parts" in capsys.readouterr().err
    assert not list(Path().glob("out/all_document.*i*"))


def test_one_process_writes_a_dataset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = Path("out/all_document.parts")
    parts.mkdir(parents=True)
    with (parts / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run("--input", "texts.jsonl") == 2
    assert "another process" in capsys.readouterr().err
    (parts / ".part-00000.1234.bin.tmp").write_bytes(b"of a run that was killed")
    (parts / "job.json").write_text("{}")
    assert run("--input", "texts.jsonl") == 0
    assert documents() == expected()
    assert not parts.exists()


def test_an_existing_dataset_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input", "texts.jsonl") == 0
    assert run("--input", "texts.parquet") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert documents() == expected()
