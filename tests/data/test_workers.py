"""Several processes that tokenize: the result is that of one, whatever happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data import chunks, tokenizing
from launcher.data.build import build_dataset
from launcher.data.loaders.base import Recipe
from launcher.errors import UserError
from tests.data.slow_tokenizers import ByteTokenizer, Fails, Unloadable, Unpicklable


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few records are several chunks for several processes."""
    monkeypatch.setattr(tokenizing, "SLOW_BYTES", 0)
    monkeypatch.setattr(tokenizing, "FAST_BYTES", 0)
    monkeypatch.setattr(chunks, "TEXT_SAMPLES", 3)
    monkeypatch.setattr(chunks, "CONVERSATIONS", 4)


def files_made(
    folder: Path, data: Path, tokenizer: Any, workers: int, *, kind: str = "HFDataLoader"
) -> tuple[dict[str, bytes], list[str]]:
    """The files of the folder of the cache, and what was logged."""
    logged: list[str] = []
    loader = DataLoaderSection(type=kind, dataset_files=[str(data)])
    build_dataset(
        DatasetSection(data_loader=loader, packing=True), tokenizer=tokenizer, seq_length=64,
        cache_dir=folder, once=lambda prepare: prepare(), log=logged.append, workers=workers,
    )  # fmt: skip
    (facts,) = folder.glob("*/facts.json")
    lines = [line.partition(" (")[0] if line.startswith("data:") else line for line in logged]
    return {path.name: path.read_bytes() for path in facts.parent.iterdir()}, lines


def write_texts(path: Path, *texts: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    return path


def test_texts_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Among them records that are counted while they are read, and while they are tokenized."""
    texts = ["x", "", None, *(f"document {'é' * n}" for n in range(20)), None, "", "last"]
    data = write_texts(tmp_path / "a.jsonl", *texts)
    files, lines = files_made(tmp_path / "one", data, ByteTokenizer(), 1)
    assert set(files) >= {"tokens.bin", "starts.bin", "facts.json"}
    assert [line.split(";")[0] for line in lines[1:]] == [
        "warning: 2 record(s) have no text in the text column and were left out",
        "note: 2 empty document(s) were left out",
    ]
    for workers in (2, 3):
        folder = tmp_path / f"with {workers}"
        assert files_made(folder, data, ByteTokenizer(), workers) == (files, lines)


def test_conversations_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, tokenizer: Any
) -> None:
    """With a warning of each chunk that is logged once, and fields that are counted."""
    data = tmp_path / "a.jsonl"
    with data.open("w") as file:
        for number in range(30):
            turns = [{"role": "user", "content": f"q{number}", "thinking": "hm"},
                     {"role": "assistant", "content": "a" * (100 * (number % 3))}]  # fmt: skip
            extra = {"odd": 1} if number % 7 == 0 else {}
            file.write(json.dumps({"messages": turns, **extra}) + "\n")
    kind = "InstructionDataLoader"
    files, lines = files_made(tmp_path / "one", data, tokenizer, 1, kind=kind)
    assert "targets.bin" in files
    assert lines[0] == "the tokenizer has no chat template: using a ChatML-like one"
    assert any("`odd` (5, first in" in line for line in lines)
    assert any("`messages[].thinking` (30, first in" in line for line in lines)
    assert files_made(tmp_path / "two", data, tokenizer, 2, kind=kind) == (files, lines)


def error_of(folder: Path, data: Path, tokenizer: Any, workers: int) -> BaseException:
    with pytest.raises((UserError, RuntimeError, ZeroDivisionError)) as caught:
        files_made(folder, data, tokenizer, workers)
    assert not list(folder.glob(".*")), "nothing is left behind"
    assert not multiprocessing.active_children()
    return caught.value


def test_errors_of_records_are_the_same(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", *"abcdefg", 5, *"hijk", 6)
    alone = error_of(tmp_path / "one", data, ByteTokenizer(), 1)
    assert f"{data}:8" in str(alone)
    assert str(error_of(tmp_path / "two", data, ByteTokenizer(), 2)) == str(alone)


def test_a_bug_or_death_of_a_worker_ends_the_work(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", *"abcdefg", "fail", *"hij")
    bug = error_of(tmp_path / "cache", data, Fails(), 2)
    assert "ZeroDivisionError: a bug" in str(bug)
    data = write_texts(tmp_path / "a.jsonl", *"abcdefg", "die", *"hij")
    death = error_of(tmp_path / "cache", data, Fails(), 2)
    assert "a process that tokenizes has died (killed by SIGKILL)" in str(death)
    assert "num_parallel_workers" in str(death)


@pytest.mark.parametrize("tokenizer", [Unpicklable(), Unloadable()], ids=["send", "load"])
def test_a_tokenizer_of_this_process_alone(tmp_path: Path, tokenizer: Any) -> None:
    data = write_texts(tmp_path / "a.jsonl", *"abcdefgh")
    expected, _ = files_made(tmp_path / "one", data, tokenizer, 1)
    files, lines = files_made(tmp_path / "two", data, tokenizer, 2)
    assert files == expected
    assert lines[0].startswith("note: one process tokenizes, as the tokenizer cannot be sent")


@pytest.mark.parametrize(
    ("size", "samples", "kind", "expected"),
    [
        (15_000_000, None, "InstructionDataLoader", 1),
        (17_000_000, None, "InstructionDataLoader", 5),
        (10**12, 9_999, "InstructionDataLoader", 1),
        (17_000_000, None, "TextDataLoader", 1),
        (65_000_000, None, "TextDataLoader", 5),
    ],
)
def test_small_data_starts_no_process(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, size: int, samples: int | None, kind: str,
    expected: int,
) -> None:  # fmt: skip
    monkeypatch.undo()
    loader = DataLoaderSection(type=kind, num_samples=samples)
    recipe = Recipe(
        section=DatasetSection(data_loader=loader), tokenizer=tokenizer, seq_length=8,
        cache_dir=Path(), log=print, workers=5,
    )  # fmt: skip
    assert tokenizing.worker_count(recipe, size) == expected


def _tokenize_for_ever(folder: str, pids: Any) -> None:
    """A job that has workers and never ends."""
    from launcher.data.workers import Workers

    loader = DataLoaderSection(type="TextDataLoader")
    recipe = Recipe(
        section=DatasetSection(data_loader=loader), tokenizer=ByteTokenizer(), seq_length=8,
        cache_dir=Path(folder), log=print,
    )  # fmt: skip
    workers = Workers(2, recipe)
    pids.send([worker.process.pid for worker in workers._workers])
    signal.pause()


@pytest.mark.crash
def test_workers_end_with_a_job_that_is_killed(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    job = context.Process(target=_tokenize_for_ever, args=(str(tmp_path), there))
    job.start()
    pids = here.recv()
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in pids):
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
