"""Tokens on disk: raw arrays that every rank memory-maps.

Owns the files of one folder of the data cache:

    tokens.bin      uint32  [tokens]           all documents, concatenated
    starts.bin      int64   [documents + 1]    offset of each document; the last is the end
    targets.bin     uint8   [tokens]           not 0 where a token is a target; absent: all are

and arrays that are added beside them. Invariants: little-endian, without a header (the sizes are in
the folder's JSON); every file is complete before the folder is renamed to its final name, and on
disk where the folder is kept.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

TOKEN_DTYPE = np.dtype("<u4")
INDEX_DTYPE = np.dtype("<i8")
TARGET_DTYPE = np.dtype("<u1")


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """The memory-mapped tokens of a dataset."""

    tokens: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.int64]
    is_target: npt.NDArray[np.uint8] | None
    content: str
    """Hash of the three arrays."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.starts)

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """The tokens of one document."""
        return self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int64)


class TokenWriter:
    """Writes the arrays of a TokenStore document by document, and hashes them."""

    def __init__(self, folder: Path, *, with_targets: bool, durable: bool = True) -> None:
        self.folder = folder
        self._durable = durable
        self.tokens = 0
        self._largest_token = 0
        self._files: dict[str, BinaryIO] = {"tokens": (folder / "tokens.bin").open("wb")}
        if with_targets:
            self._files["targets"] = (folder / "targets.bin").open("wb")
        self._hashes = {name: xxh3_128() for name in ("tokens", "starts", "targets")}
        self._starts = array("q", [0])

    def add(
        self,
        documents: Sequence[list[int]],
        targets: Sequence[npt.NDArray[np.bool_ | np.uint8]] = (),
    ) -> None:
        """Append documents (lists of token ids) and, where the store has them, their targets.

        Documents without tokens are dropped: every offset belongs to a token.
        """
        lengths = np.fromiter(map(len, documents), dtype=INDEX_DTYPE, count=len(documents))
        tokens = np.fromiter(chain.from_iterable(documents), dtype=TOKEN_DTYPE)
        self.add_arrays(lengths, tokens, np.concatenate(targets) if targets else None)

    def add_arrays(
        self,
        lengths: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.uint32],
        targets: npt.NDArray[np.bool_ | np.uint8] | None = None,
    ) -> None:
        """As `add`: tokens of each document, all tokens in a row, and their targets."""
        ends = self.tokens + np.cumsum(lengths[lengths > 0])
        self._starts.frombytes(ends.astype(np.int64).tobytes())
        self.tokens += len(tokens)
        self._largest_token = max(self._largest_token, int(tokens.max(initial=0)))
        self._write("tokens", tokens.astype(TOKEN_DTYPE, copy=False))
        if targets is not None:
            self._write("targets", targets.astype(TARGET_DTYPE))

    def finish(self) -> dict[str, Any]:
        """Complete the files. Returns the metadata for `open_store`."""
        for file in self._files.values():
            _complete(file, durable=self._durable)
        starts = np.array(self._starts, dtype=INDEX_DTYPE)
        self._hashes["starts"].update(starts.tobytes())
        write_array(self.folder / "starts.bin", starts, durable=self._durable)
        content = xxh3_128("/".join(h.hexdigest() for h in self._hashes.values()).encode())
        return {
            "tokens": self.tokens,
            "documents": len(starts) - 1,
            "largest_token": self._largest_token,
            "has_targets": "targets" in self._files,
            "content": content.hexdigest(),
        }

    def close(self) -> None:
        """Close the files; harmless after `finish`."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        raw = values.tobytes()
        self._files[name].write(raw)
        self._hashes[name].update(raw)


def open_store(folder: Path, metadata: dict[str, Any]) -> TokenStore:
    """Map the store by the metadata of `finish`; OSError or ValueError for a damaged file."""
    return TokenStore(
        tokens=map_array(folder / "tokens.bin", TOKEN_DTYPE, metadata["tokens"]),
        starts=map_array(folder / "starts.bin", INDEX_DTYPE, metadata["documents"] + 1),
        is_target=map_array(folder / "targets.bin", TARGET_DTYPE, metadata["tokens"])
        if metadata["has_targets"]
        else None,
        content=metadata["content"],
    )


def write_array(path: Path, values: npt.NDArray[Any], *, durable: bool = True) -> None:
    """Write one array; `durable`: it is on disk when this returns."""
    with path.open("wb") as file:
        file.write(values.tobytes())
        _complete(file, durable=durable)


def map_array(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """Map one array read-only. Raises OSError or ValueError when the file has another size."""
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, not {count * dtype.itemsize}")
    if count == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)


def _complete(file: BinaryIO, *, durable: bool) -> None:
    file.flush()
    if durable:
        os.fsync(file.fileno())
    file.close()
