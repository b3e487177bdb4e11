"""The data cache: what its keys depend on, two jobs at once, what is deleted and what never is."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data import cache, content
from launcher.data.build import build_dataset
from launcher.data.progress import ignore_progress
from launcher.data.store import TokenWriter
from launcher.errors import UserError
from tests.data.slow_tokenizers import ByteTokenizer
from tests.ranks import run_ranks

from .conftest import Build


def folders(tmp_path: Path) -> set[str]:
    return {path.parent.name for path in (tmp_path / "cache").glob("*/facts.json")}


def made_again(logged: list[str]) -> bool:
    """Whether the last dataset was tokenized, and not in the cache."""
    return "(from the cache " not in [line for line in logged if line.startswith("data: ")][-1]


def settle(*paths: Path) -> None:
    """Set the times of files back, as if they had been written long ago."""
    for path in paths:
        os.utime(path, (1, 1))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are as good as old from the beginning."""
    monkeypatch.setattr(content, "SETTLE_SECONDS", -1.0)


def copied(corpus: Path) -> Path:
    return Path(shutil.copytree(corpus, corpus.with_name("copy")))


def moved(corpus: Path) -> Path:
    return corpus.rename(corpus.with_name("elsewhere"))


def touched(corpus: Path) -> Path:
    for path in corpus.rglob("*.txt"):
        path.touch()
    return corpus


def renamed(corpus: Path) -> Path:
    (corpus / "5.txt").rename(corpus / "5b.txt")
    return corpus


def linked(corpus: Path) -> Path:
    corpus.with_name("link").symlink_to(corpus)
    return corpus.with_name("link")


@pytest.mark.parametrize("change", [copied, moved, touched, renamed, linked])
def test_files_with_the_same_content_are_not_tokenized_again(
    build: Build, corpus: Path, logged: list[str], change: Any
) -> None:
    first = build(dataset_dir=str(corpus))
    again = build(dataset_dir=str(change(corpus)))
    assert not made_again(logged)
    assert again.fingerprint == first.fingerprint


def same_size_and_time(corpus: Path) -> None:
    path, status = corpus / "1.txt", (corpus / "1.txt").stat()
    path.write_text(path.read_text().replace("ship1", "boat1"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def another_order(corpus: Path) -> None:
    (corpus / "1.txt").rename(corpus / "9.txt")


def another_kind(corpus: Path) -> None:
    (corpus / "1.txt").rename(corpus / "1.md")


def one_less(corpus: Path) -> None:
    (corpus / "1.txt").unlink()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [same_size_and_time, another_order, another_kind, one_less])
def test_another_content_is_another_dataset(
    build: Build, corpus: Path, logged: list[str], change: Any
) -> None:
    build(dataset_dir=str(corpus), suffixes=["txt", "md"])
    change(corpus)
    build(dataset_dir=str(corpus), suffixes=["txt", "md"])
    assert made_again(logged)


def test_a_file_of_another_split_is_another_dataset(build: Build, tmp_path: Path) -> None:
    for name in "abc":
        rows = ({"text": f"{name} {number} on the slipway"} for number in range(4))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    settings = {"type": "HFDataLoader", "split": "train[:2]+test[:2]", "path": "json"}
    one = build(data_files={"train": [a, b], "test": [c]}, **settings)
    other = build(data_files={"train": [a], "test": [b, c]}, **settings)
    assert one.content != other.content


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_not_read_again(
    build: Build, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    hashed = content._hashed
    monkeypatch.setattr(
        content, "_hashed", lambda path, meter: (read.append(path.name), hashed(path, meter))[1]
    )
    build(dataset_dir=str(corpus))
    assert len(read) == 7
    read.clear()
    build(dataset_dir=str(corpus))
    assert read == []
    (corpus / "3.txt").touch()
    build(dataset_dir=str(corpus))
    assert read == ["3.txt"]
    for damage in ("{", "[]", '{"a": 1}'):
        read.clear()
        (tmp_path / "cache" / content.MEMO).write_text(damage)
        build(dataset_dir=str(corpus))
        assert len(read) == 7


def test_a_file_that_was_just_written_is_not_trusted(
    build: Build, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "SETTLE_SECONDS", 1e9)
    build(dataset_dir=str(corpus))
    assert not (tmp_path / "cache" / content.MEMO).exists()


def test_the_beginning_of_large_data_is_not_hashed(
    build: Build, corpus: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_hashed", lambda *_: pytest.fail("read"))
    build(dataset_dir=str(corpus), num_samples=2)
    build(dataset_dir=str(corpus), num_samples=2)
    assert not made_again(logged)


def test_warnings_name_the_files_where_they_are_now(
    build: Build, corpus: Path, logged: list[str]
) -> None:
    (corpus / "bad.txt").write_bytes(b"caf\xe9 au lait")
    build(dataset_dir=str(corpus))
    there = moved(corpus)
    build(dataset_dir=str(there))
    assert not made_again(logged)
    assert f"the first file is {there}/bad.txt (line 1, offset 3)" in logged[-1]


def test_a_file_that_changes_meanwhile_is_an_error(
    build: Build, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = TokenWriter.finish

    def and_append(writer: TokenWriter) -> Any:
        with (corpus / "5.txt").open("a") as file:
            file.write("more")
        return finish(writer)

    monkeypatch.setattr(TokenWriter, "finish", and_append)
    with pytest.raises(UserError, match=r"5\.txt: has changed while it was read"):
        build(dataset_dir=str(corpus))
    assert folders(tmp_path) == set()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_oldest_unused_datasets_are_deleted(
    tmp_path: Path, corpus: Path, tokenizer: Any
) -> None:
    lines: list[str] = []

    def build(name: str, limit: int | None) -> Any:
        section = DatasetSection(
            data_loader=DataLoaderSection(dataset_dir=str(corpus / name)), packing=True
        )
        return build_dataset(
            section, tokenizer=tokenizer, seq_length=8, cache_dir=tmp_path / "cache",
            once=lambda prepare: prepare(), log=lines.append, max_cache_bytes=limit,
        )  # fmt: skip

    foreign = [tmp_path / "cache" / name for name in ("a" * 32, "notes", "huggingface_datasets")]
    for folder in foreign:
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"x" * 100_000)
    datasets = {name: build(f"{name}.txt", None) for name in "135"}
    places = {name: Path(dataset.cached_in) for name, dataset in datasets.items()}
    for age, name in enumerate("513"):  # 5 was used last, 3 never since
        os.utime(places[name] / cache.LEASE, (1e9 - age, 1e9 - age))
    del datasets["3"], datasets["5"]
    gc.collect()
    lines.clear()

    first = build("deep/er/2.txt", None)
    limit = sum(map(size_of, [*places.values(), Path(first.cached_in)])) - 1
    build("1.txt", 1)
    assert all(place.exists() for place in places.values()), "nothing was added"
    shutil.rmtree(first.cached_in)
    first = build("deep/er/2.txt", limit)
    assert [places[name].exists() for name in "135"] == [True, False, True]
    assert "1 dataset(s) last used until 2001-09-0" in lines[-1]
    assert "data_cache.max_gb = " in lines[-1]
    build("deep/er/0.txt", 1)
    assert [places[name].exists() for name in "135"] == [True, False, False], "1 is in use"
    assert Path(first.cached_in).exists(), "in use"
    assert lines[-1].startswith("warning: the data cache ")
    assert datasets["1"].row(0).input_ids.size == 8
    assert all((folder / "tokens.bin").exists() for folder in foreign)
    del datasets, first
    gc.collect()
    last = build("deep/er/4.txt", 1)
    assert folders(tmp_path) == {Path(last.cached_in).name}


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks(
    build: Build, corpus: Path, tmp_path: Path, logged: list[str]
) -> None:
    dataset = build(dataset_dir=str(corpus))
    build(dataset_dir=str(corpus))
    assert not made_again(logged)
    assert not list((tmp_path / "cache").glob(".*"))
    folder = Path(dataset.cached_in)
    cache.make_room(tmp_path / "cache", 1, keep=Path("another"), log=print)
    assert folder.exists(), "it was used less than a week ago"
    settle(folder / cache.LEASE)
    cache.make_room(tmp_path / "cache", 1, keep=Path("another"), log=print)
    assert not folder.exists()


@pytest.mark.usefixtures("without_locks")
def test_the_folder_of_the_first_of_two_jobs_stays(tmp_path: Path) -> None:
    folder = tmp_path / "x"

    def make(content: str) -> bool:
        def fill(scratch: Path) -> None:
            if content == "mine":  # meanwhile the other job is done
                assert make("theirs")
            (scratch / "content").write_text(content)

        return cache.make_once(folder, fill, folder.exists, verb="make", log=print,
                               on_progress=ignore_progress)  # fmt: skip

    make("mine")
    assert (folder / "content").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]
    assert not make("again")


def test_what_a_killed_job_left_is_removed_by_the_next(
    build: Build, corpus: Path, tmp_path: Path
) -> None:
    key = Path(build(dataset_dir=str(corpus)).cached_in).name
    root = tmp_path / "cache"
    shutil.rmtree(root / key)
    (root / f".{key}.1234.tmp").mkdir()
    (root / f".{key}.lock").write_text("process 1 on gone")
    (root / f".{'b' * 32}.1234.tmp").mkdir()
    (root / f".{'b' * 32}.lock").touch()
    build(dataset_dir=str(corpus))
    left = {path.name for path in root.glob(".*")}
    assert left == {f".{'b' * 32}.1234.tmp", f".{'b' * 32}.lock"}, "of a job that may be alive"
    settle(*(root / name for name in left))
    shutil.rmtree(root / key)
    build(dataset_dir=str(corpus))
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_errors_of_the_disk(
    build: Build, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(writer: TokenWriter, *_: Any) -> None:
        raise OSError(number, os.strerror(number), str(writer.folder / "tokens.bin"))

    monkeypatch.setattr(TokenWriter, "_write", fail)
    with pytest.raises(UserError) as caught:
        build(dataset_dir=str(corpus))
    assert f"the data cache cannot be written ({os.strerror(number)})" in str(caught.value)
    assert ("data_cache.max_gb" in str(caught.value)) == (number != errno.EIO)
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left <= {content.MEMO}


class Gated(ByteTokenizer):
    """Lets the other job arrive before it tokenizes, and notes that it does."""

    def __init__(self, folder: Path, job: int) -> None:
        self.folder, self.job = folder, job

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Any]:
        (self.folder / f"tokenized by {self.job}").touch()
        while not (self.folder / "waiting").exists():
            time.sleep(0.01)
        return super().__call__(texts, add_special_tokens=add_special_tokens)


def _job(folder: str) -> tuple[str, list[str]]:
    """One of two jobs on one cache: the fingerprint of its data, and its log."""
    root, job = Path(folder), int(os.environ["RANK"])
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if "waiting for process" in line:
            (root / "waiting").touch()

    dataset = build_dataset(
        DatasetSection(data_loader=DataLoaderSection(dataset_dir=str(root / "a.txt"))),
        tokenizer=Gated(root, job), seq_length=8, cache_dir=root / "cache",
        once=lambda prepare: prepare(), log=log,
    )  # fmt: skip
    return dataset.fingerprint, lines


def test_of_two_jobs_at_once_one_tokenizes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once")
    (one, said), (two, also) = run_ranks(2, _job, str(tmp_path))
    assert one == two
    assert len(list(tmp_path.glob("tokenized by *"))) == 1
    waited = [line for line in (*said, *also) if "waiting for process" in line]
    assert len(waited) == 1
    assert "another job" in waited[0]
    assert len([line for line in (*said, *also) if "(from the cache " in line]) == 1
    assert not list((tmp_path / "cache").glob(".*"))
