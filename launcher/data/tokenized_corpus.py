"""A corpus of documents as a Megatron dataset: tokenized in parts, joined, verified.

Owns the folder `<prefix>.parts` while the work is going on:

    job.json                  what decides the result: sources, tokenizer, settings
    part-00000.bin, .idx      the tokens of some consecutive documents
    part-00000.json           its samples, tokens and the hash of their bytes; written last
    all.bin, all.idx          all parts, until they are verified
    lock                      locked by the process that writes here

Invariants: a part counts only with its JSON file, so that a run that was killed goes on after the
last complete part; parts of another job are never used; the dataset appears under its name when it
is complete and has been read back.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from launcher.data.megatron.header import index_path, tokens_path
from launcher.data.megatron.indexed import open_indexed
from launcher.data.megatron.writer import IndexedWriter, rename_dataset
from launcher.errors import UserError

PART_TOKENS = 1 << 25
"""Tokens after which a part ends: what a killed run loses at most."""
_READ_AT_ONCE = 1 << 24
LOCK = "lock"

Tokens = npt.ArrayLike


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is written, and from what."""

    prefix: Path
    dtype: np.dtype[Any]
    job: Mapping[str, Any]
    """JSON values that decide the result; a folder of parts of another job is not continued."""
    batches: Callable[[int], Iterator[list[Tokens]]]
    """The documents after so many samples of the source, in batches, one entry for each sample."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A complete dataset."""

    documents: int
    tokens: int
    total_bytes: int
    continued_after: int
    """Documents that an earlier run had done."""


def write_corpus(corpus: Corpus, *, overwrite: bool) -> Written:
    """Write the dataset of a corpus. Raises UserError where one of that name exists."""
    _check_new(corpus.prefix, overwrite=overwrite)
    folder = Path(f"{corpus.prefix}.parts")
    parts = _Parts(folder, corpus)
    before = parts.samples
    with closing(parts):
        for batch in corpus.batches(parts.samples):
            parts.add(batch)
        parts.end()
        if not parts.samples:
            raise UserError("there are no documents", rule="a dataset has a document",
                            advice="Look into the files")  # fmt: skip
        joined = folder / "all"
        with IndexedWriter(joined, dtype=corpus.dtype) as writer:
            for path in parts.paths():
                writer.append_dataset(path)
            documents, tokens = writer.documents, writer.tokens
            if documents != parts.samples:
                raise UserError(
                    f"{documents} documents were written, {parts.samples} were read",
                    where=str(folder), rule="every document is kept",
                    advice=f"Delete {folder} and start again",
                )  # fmt: skip
            writer.finish()
        _verify(joined, parts.done, corpus.dtype.itemsize)
        rename_dataset(joined, corpus.prefix)
        shutil.rmtree(folder)
    size = sum(path(corpus.prefix).stat().st_size for path in (index_path, tokens_path))
    return Written(documents=documents, tokens=tokens, total_bytes=size, continued_after=before)


@dataclass(frozen=True)
class Part:
    """A complete part."""

    samples: int
    tokens: int
    digest: str
    """xxh3_128 of the bytes of its tokens, of what was in memory."""


class _Parts:
    """The parts in a folder, and the one that is being written."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self._folder, self._dtype = folder, corpus.dtype
        self.done: list[Part] = []
        self._digest = xxh3_128()
        self._writer: IndexedWriter | None = None
        self.samples = self.tokens = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self._open(json.loads(json.dumps(dict(corpus.job))))

    def _open(self, job: Any) -> None:
        described = self._folder / "job.json"
        try:
            same = json.loads(described.read_text()) == job
        except (OSError, ValueError):
            same = False
        if not same:
            names = [path for path in self._folder.iterdir() if path.name != LOCK]
            if names and not described.exists():
                raise UserError(
                    "the folder has files that this tool did not write", where=str(self._folder),
                    rule="parts are written there", advice="Move it away",
                )  # fmt: skip
            self._delete("*")
            scratch = self._folder / "job.json.tmp"
            scratch.write_text(json.dumps(job, indent=1))
            os.replace(scratch, described)
        self._delete(".*.tmp")  # of a run that was killed
        while (done := self._described(len(self.done))) is not None:
            self.done.append(done)
        self.samples = sum(part.samples for part in self.done)
        self.tokens = sum(part.tokens for part in self.done)

    def _delete(self, pattern: str) -> None:
        for path in self._folder.glob(pattern):
            if path.name != LOCK:
                path.unlink()

    def _described(self, number: int) -> Part | None:
        try:
            found = Part(**json.loads(self._path(number, ".json").read_text()))
            opened = open_indexed(self._path(number))
        except (OSError, ValueError, TypeError, UserError):
            return None
        fits = (opened.documents, int(opened.lengths.sum())) == (found.samples, found.tokens)
        return found if fits else None

    def add(self, batch: list[Tokens]) -> None:
        """Append documents, one for each sample."""
        if not batch:
            return
        if self._writer is None:
            self._writer = IndexedWriter(self._path(len(self.done)), dtype=self._dtype)
        self._writer.add_documents(batch)
        for tokens in batch:
            self._digest.update(np.asarray(tokens).astype(self._dtype).tobytes())
            self.tokens += len(np.asarray(tokens))
        self.samples += len(batch)
        if self._writer.tokens >= PART_TOKENS:
            self.end()

    def end(self) -> None:
        """Complete the current part."""
        if self._writer is None:
            return
        number, writer = len(self.done), self._writer
        self._writer = None
        writer.finish()
        done = Part(writer.documents, writer.tokens, self._digest.hexdigest())
        self._digest = xxh3_128()
        scratch = self._path(number, ".json.tmp")
        scratch.write_text(json.dumps(asdict(done)))
        os.replace(scratch, self._path(number, ".json"))
        self.done.append(done)

    def close(self) -> None:
        """Drop the part that is not complete; another process may write to the folder."""
        if self._writer is not None:
            self._writer.close()
        if not self.done:
            shutil.rmtree(self._folder, ignore_errors=True)  # nothing to go on from
        os.close(self._lock)

    def paths(self) -> Iterator[Path]:
        """The complete parts, in order."""
        return map(self._path, range(len(self.done)))

    def _path(self, number: int, ending: str = "") -> Path:
        return self._folder / f"part-{number:05d}{ending}"


def _locked(folder: Path) -> int:
    """The descriptor of the lock of a folder. Raises UserError where another process has it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            "another process writes this dataset", where=str(folder),
            rule="one process writes to a folder of parts",
            advice="Wait until it is done, or give another --output_prefix",
        ) from None  # fmt: skip
    except OSError:
        pass  # a file system without locks
    return descriptor


def _check_new(prefix: Path, *, overwrite: bool) -> None:
    if prefix.is_dir():
        raise UserError(
            f"{prefix} is a directory", rule="the prefix is the path of two files, without .bin "
            "and .idx", nearest=f"Nearest: {prefix / 'text_document'}",
        )  # fmt: skip
    existing = [path for path in (index_path(prefix), tokens_path(prefix)) if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} exists", rule="a dataset is not replaced by accident",
            advice="Give another --output_prefix, or --overwrite",
        )  # fmt: skip


def _verify(prefix: Path, parts: Sequence[Part], token_bytes: int) -> None:
    """Read the dataset back: its index, and the tokens of each part."""
    open_indexed(prefix).check()
    with tokens_path(prefix).open("rb") as file:
        for part in parts:
            digest, left = xxh3_128(), part.tokens * token_bytes
            while left and (block := file.read(min(left, _READ_AT_ONCE))):
                digest.update(block)
                left -= len(block)
            if digest.hexdigest() != part.digest:
                raise UserError(
                    "the tokens that were read back differ from those that were written",
                    where=str(tokens_path(prefix)), rule="what is written is verified",
                    advice="Check the disk, delete the dataset and its .parts, and start again",
                )  # fmt: skip
