"""Writing a Megatron dataset (`.bin`/`.idx`) document by document.

Owns `IndexedWriter`. Invariants:

1. Until `finish` both files have temporary names; the `.bin` file gets its name first, so that an
   `.idx` file never exists without its tokens.
2. Memory does not grow with tokens: only the lengths of sequences and the borders of documents
   (12 bytes each at most) are kept until the end.
3. Tokens that the type of the file cannot hold are an error, never cut.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from launcher.data.megatron.header import (
    HEADER,
    MAGIC,
    TOKEN_TYPES,
    VERSION,
    index_path,
    tokens_path,
)
from launcher.data.megatron.indexed import open_indexed
from launcher.errors import UserError

LARGEST_UINT16_VOCABULARY = 65500
"""Vocabularies below this are written as uint16 by Megatron, others as int32."""
_CODES = {name: code for code, name in TOKEN_TYPES.items()}
_INDEX_BLOCK = 1 << 20
_COPIED_AT_ONCE = 1 << 24


def token_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The type of tokens that Megatron chooses: uint16 for a vocabulary < 65500, else int32."""
    is_small = vocab_size is not None and vocab_size < LARGEST_UINT16_VOCABULARY
    return np.dtype(np.uint16 if is_small else np.int32)


class IndexedWriter:
    """Writes one dataset; use it as a context manager, and call `finish` at its end.

        with IndexedWriter(prefix, dtype=token_dtype(vocab_size)) as writer:
            for tokens in documents:
                writer.add_document(tokens)
            writer.finish()

    Leaving the block without `finish`, by an error too, leaves no file behind.
    """

    def __init__(self, prefix: str | Path, *, dtype: npt.DTypeLike, modes: bool = False) -> None:
        """`prefix`: the path of the dataset without extension. `modes`: with a mode for each
        sequence (multimodal). Raises UserError for a type that is none of the format."""
        self.prefix = index_path(prefix).with_suffix("")
        self.dtype = np.dtype(dtype)
        if self.dtype.name not in _CODES or self.dtype.kind == "f":
            known = ", ".join(name for name in _CODES if "float" not in name)
            raise UserError(
                f"{self.prefix}: tokens of type {self.dtype.name}",
                rule=f"a Megatron dataset has tokens of one of these types: {known}",
            )
        self.tokens = 0
        """Tokens written so far."""
        self._lengths, self._borders = array("i"), array("q", [0])
        self._modes = array("b") if modes else None
        limits = np.iinfo(self.dtype.name)
        self._limits = int(limits.min), int(limits.max)
        self._scratch = f".{self.prefix.name}.{uuid4().hex}"
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = self._scratch_path(".bin").open("wb")

    @property
    def sequences(self) -> int:
        """Sequences written so far."""
        return len(self._lengths)

    @property
    def documents(self) -> int:
        """Documents ended so far."""
        return len(self._borders) - 1

    def add_sequence(self, tokens: npt.ArrayLike, mode: int = 0) -> None:
        """Append a sequence of token ids (1-D; may be empty) to the current document.

        Raises UserError for an id that the type of the file cannot hold.
        """
        values = np.asarray(tokens)
        if values.size and values.dtype.kind not in "iu":
            raise TypeError(f"token ids are integers, not {values.dtype}")
        self._check_range(values)
        self._output().write(values.astype(self.dtype.newbyteorder("<")).tobytes())
        self._lengths.append(values.size)
        self.tokens += values.size
        if self._modes is not None:
            self._modes.append(mode)

    def end_document(self) -> None:
        """End the current document; without sequences it is an empty one."""
        self._output()
        self._borders.append(len(self._lengths))

    def add_document(self, *sequences: npt.ArrayLike) -> None:
        """Append a document of these sequences (usually one)."""
        for tokens in sequences:
            self.add_sequence(tokens)
        self.end_document()

    def add_documents(self, documents: Iterable[npt.ArrayLike]) -> None:
        """Append documents of one sequence each."""
        for tokens in documents:
            self.add_document(tokens)

    def append_dataset(self, prefix: str | Path) -> None:
        """Append all documents of another dataset, of the same type of tokens, without decoding
        them. The current document must be ended."""
        other = open_indexed(prefix)
        if other.header.dtype != self.dtype.name:
            raise UserError(
                f"its tokens are {other.header.dtype}",
                where=str(index_path(prefix)),
                rule=f"it is appended to a dataset of {self.dtype.name}",
            )
        output, before = self._output(), len(self._lengths)
        sizes = other.lengths.astype(np.int64) * self.dtype.itemsize
        if np.array_equal(other.offsets, np.cumsum(sizes) - sizes):
            for begin in range(0, int(sizes.sum()) // self.dtype.itemsize, _COPIED_AT_ONCE):
                output.write(other.tokens[begin : begin + _COPIED_AT_ONCE].tobytes())
        else:
            for index in range(len(other)):
                output.write(other.sequence(index).tobytes())
        self._lengths.frombytes(other.lengths.tobytes())
        self._borders.frombytes((other.borders[1:] + before).tobytes())
        if self._modes is not None:
            modes = np.zeros(len(other), np.int8) if other.modes is None else other.modes
            self._modes.frombytes(modes.tobytes())
        self.tokens += int(other.lengths.sum(dtype=np.int64))

    def finish(self) -> Path:
        """Complete both files under their names, replacing older ones. Returns the prefix.

        Raises ValueError when the last document is not ended.
        """
        if self._borders[-1] != len(self._lengths):
            raise ValueError("the last document is not ended")
        output = self._output()
        self._file = None
        _complete(output)
        with self._scratch_path(".idx").open("wb") as file:
            self._write_index(file)
            _complete(file)
        _rename(self._scratch_path(".bin"), self._scratch_path(".idx"), self.prefix)
        return self.prefix

    def close(self) -> None:
        """Remove what is not finished; harmless after `finish`."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for ending in (".bin", ".idx"):
            self._scratch_path(ending).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _scratch_path(self, ending: str) -> Path:
        return self.prefix.parent / f"{self._scratch}{ending}.tmp"

    def _output(self) -> BinaryIO:
        if self._file is None:
            raise ValueError(f"{self.prefix} is finished or closed")
        return self._file

    def _check_range(self, values: npt.NDArray[Any]) -> None:
        if not values.size:
            return
        smallest, largest = int(values.min()), int(values.max())
        if smallest < self._limits[0] or largest > self._limits[1]:
            raise UserError(
                f"document {self.documents} has token "
                f"{smallest if smallest < self._limits[0] else largest}",
                where=str(tokens_path(self.prefix)),
                rule=f"{self.dtype.name} holds {self._limits[0]} to {self._limits[1]}",
                advice="Write the dataset with a wider type",
            )

    def _write_index(self, file: BinaryIO) -> None:
        code = _CODES[self.dtype.name]
        file.write(HEADER.pack(MAGIC, VERSION, code, len(self._lengths), len(self._borders)))
        lengths = np.frombuffer(self._lengths, dtype=np.intc) if self._lengths else _NONE
        file.write(lengths.astype("<i4", copy=False).tobytes())
        offset = 0
        for begin in range(0, len(lengths), _INDEX_BLOCK):
            sizes = lengths[begin : begin + _INDEX_BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8", copy=False).tobytes())
            offset = int(ends[-1])
        file.write(np.frombuffer(self._borders, dtype=np.int64).astype("<i8", copy=False).tobytes())
        if self._modes is not None:
            file.write(self._modes.tobytes())


_NONE = np.zeros(0, np.intc)


def rename_dataset(prefix: Path, new_prefix: Path) -> None:
    """Give a complete dataset another name in the same file system, replacing an older one."""
    _rename(tokens_path(prefix), index_path(prefix), new_prefix)


def _rename(tokens: Path, index: Path, prefix: Path) -> None:
    index_path(prefix).unlink(missing_ok=True)  # an older one is never beside the new tokens
    os.replace(tokens, tokens_path(prefix))
    os.replace(index, index_path(prefix))


def _complete(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
