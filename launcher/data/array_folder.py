"""Folders of arrays in the data cache: written once, checked, memory-mapped.

A folder has a `.npy` file for each array and `arrays.json` with their types, lengths and hashes and
further values of its kind of data. Invariants: arrays may be larger than memory. Files are not
flushed to the disk: what a crash leaves incomplete is found by the hashes. `cache.make_once`
decides who makes a folder, and when.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

NewArray = Callable[[str, npt.DTypeLike, int], npt.NDArray[Any]]
"""(name, dtype, length) -> an array in a file, to fill."""
_INDEX = "arrays.json"
_HASHED_AT_ONCE = 1 << 24
IN_MEMORY = 1 << 28
"""Bytes up to which an array is made in memory before it is written."""


class DamagedArrays(Exception):
    """The folder is not complete or not as it was written; the text is what is wrong."""


@dataclass(frozen=True, kw_only=True)
class ArrayFolder:
    """The arrays of a folder, read-only memory maps, and what was kept with them."""

    arrays: Mapping[str, npt.NDArray[Any]]
    metadata: Mapping[str, Any]


def write_arrays(folder: Path, fill: Callable[[NewArray], Mapping[str, Any]]) -> None:
    """Write the files of `folder`, which exists and is empty. `fill` makes and fills the arrays,
    and returns what is kept with them (JSON values). Raises OSError, and whatever `fill` raises."""
    made: dict[str, npt.NDArray[Any]] = {}

    def new_array(name: str, dtype: npt.DTypeLike, length: int) -> npt.NDArray[Any]:
        path = folder / f"{name}.npy"
        kind = np.dtype(dtype)
        if length * kind.itemsize <= IN_MEMORY:
            made[name] = np.empty(length, dtype=kind)
        else:
            made[name] = np.lib.format.open_memmap(path, "w+", kind, (length,)).view(np.ndarray)
        return made[name]

    metadata = fill(new_array)
    described = {
        name: {"dtype": array.dtype.str, "length": len(array), "hash": _hash(array)}
        for name, array in made.items()
    }
    for name, array in made.items():
        if array.nbytes <= IN_MEMORY:
            np.save(folder / f"{name}.npy", array)
    index = {"arrays": described, "metadata": dict(metadata)}
    (folder / _INDEX).write_text(json.dumps({"hash": _hash_of_json(index), **index}))


def open_array_folder(folder: Path, *, verify: bool) -> ArrayFolder:
    """Map the arrays of `folder`. `verify`: compare their hashes too, which reads all of them.

    Raises FileNotFoundError where there is none, DamagedArrays where it is not as it was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        index = json.loads((folder / _INDEX).read_text())
        if index.pop("hash") != _hash_of_json(index):
            raise ValueError(f"{_INDEX} is not as it was written")
        found = {
            name: _map(folder / f"{name}.npy", entry, verify=verify)
            for name, entry in index["arrays"].items()
        }
        return ArrayFolder(arrays=found, metadata=index["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedArrays(f"{folder}: {error}") from error


def _map(path: Path, entry: Mapping[str, Any], *, verify: bool) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(
        path, mmap_mode="r" if entry["length"] else None, allow_pickle=False
    ).view(np.ndarray)
    if array.dtype.str != entry["dtype"] or array.shape != (entry["length"],):
        raise ValueError(f"{path.name} is {array.dtype} {array.shape}")
    if verify and _hash(array) != entry["hash"]:
        raise ValueError(f"{path.name} has another content than was written")
    return array


def _hash(array: npt.NDArray[Any]) -> str:
    found = xxh3_128()
    for begin in range(0, len(array), _HASHED_AT_ONCE):
        found.update(np.ascontiguousarray(array[begin : begin + _HASHED_AT_ONCE]).data)
    return found.hexdigest()


def _hash_of_json(value: Any) -> str:
    return xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()
