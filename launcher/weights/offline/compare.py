"""Comparing two checkpoints of any layout or format, tensor by tensor. Torch-free.

Owns what counts as a difference. Tensors are equal if name, shape, dtype and bits are. A tensor
that only one side has may have another name on the other side, which equal bits show. Memory: a few
portions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from launcher.layout.box import Box, full_box
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.joined import together
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.reading.transfer import Files
from launcher.weights.source import Source
from launcher.weights.streaming.cast import cast
from launcher.weights.streaming.portion import PortionReader, Words
from launcher.weights.threads import in_parallel

Kind = Literal["differs", "dtype differs", "shape differs", "only in A", "only in B", "renamed"]
Keep = Callable[[str], bool]

PORTION_BYTES = 8 << 20
READERS = 4
_NUMPY = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
          "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "u1", "C64": "c8"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One tensor that is not the same on both sides."""

    name: str
    kind: Kind
    detail: str = ""
    largest: float | None = None
    """Largest difference of two elements; NaN where one of them is NaN; None: not known."""


@dataclass(frozen=True)
class Difference:
    """The differences of two checkpoints, the worst first."""

    equal: int
    """Tensors that are the same."""
    rows: tuple[Row, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every tensor is the same under the same name."""
        return not self.rows


def compare(
    a: Source, b: Source, *, keep: Keep = lambda name: True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Difference:  # fmt: skip
    """The differences between two sources, among tensors whose name passes `keep`.

    What only one of them has as one tensor, as complete weights do (`launcher.weights.joined`), is
    compared so. Raises `UserError` when a file cannot be read.
    """
    a, b = together(a, None, wanted=b.tensors), together(b, None, wanted=a.tensors)
    names_a, names_b = ({n for n in source.tensors if keep(n)} for source in (a, b))
    common = sorted(names_a & names_b)
    sizes = [math.prod(a.shape(name)) * ITEM_BYTES[a.dtype(name)] for name in common]
    rows: list[Row] = []
    done = 0
    with Files() as files_a, Files() as files_b:
        readers = PortionReader(a, files_a), PortionReader(b, files_b)
        for name, size in zip(common, sizes, strict=True):
            row = _compared(name, (a, b), readers)
            rows += [] if row is None else [row]
            done += size
            progress(done, sum(sizes))
        alone = [_digests(source, sorted(names), reader) for source, names, reader in zip(
            (a, b), _candidates(a, b, names_a, names_b), readers, strict=True)]  # fmt: skip
    equal = len(common) - len(rows)
    rows += _one_sided(names_a - names_b, names_b - names_a, *alone)
    return Difference(equal, tuple(sorted(rows, key=_order)))


_KINDS: Sequence[Kind] = (
    "shape differs", "only in A", "only in B", "dtype differs", "differs", "renamed",
)  # fmt: skip


def _order(row: Row) -> tuple[int, float, str]:
    largest = math.inf if row.largest is None or math.isnan(row.largest) else row.largest
    return _KINDS.index(row.kind), -largest, row.name


def _compared(
    name: str, sources: tuple[Source, Source], readers: tuple[PortionReader, PortionReader]
) -> Row | None:
    """The row of a tensor that both sides have; None when it is equal."""
    (shape, other_shape), (dtype, other) = zip(
        *((source.shape(name), source.dtype(name)) for source in sources), strict=True
    )
    if shape != other_shape:
        return Row(name, "shape differs", f"{list(shape)} | {list(other_shape)}")
    limit = PORTION_BYTES // max(ITEM_BYTES[dtype], ITEM_BYTES[other])

    def difference(box: Box) -> tuple[int, float | None]:
        first, second = (reader.read(name, box).values for reader in readers)
        return _difference(first, dtype, second, other)

    found = in_parallel(difference, full_box(shape).portions(limit), READERS)
    elements = sum(count for count, _ in found)
    if dtype == other and not elements:
        return None
    worst = [largest for _, largest in found if largest is not None]
    largest = None if len(worst) < len(found) else float(np.max(worst, initial=0.0))
    if dtype != other:
        return Row(name, "dtype differs", f"{dtype} | {other}", largest)
    share = f"{elements:,} of {math.prod(shape):,} elements"
    return Row(name, "differs", share, largest)


def _difference(a: Words, dtype_a: str, b: Words, dtype_b: str) -> tuple[int, float | None]:
    """(elements with other bits, largest difference); None for dtypes without arithmetic."""
    if dtype_a == dtype_b:
        other = a != b
        count = int(np.count_nonzero(other))
        if not count:
            return 0, 0.0
        a, b = a[other], b[other]
    else:
        count = a.size
    numbers_a, numbers_b = _numbers(a, dtype_a), _numbers(b, dtype_b)
    if numbers_a is None or numbers_b is None:
        return count, None
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(numbers_a - numbers_b)
    same = (numbers_a == numbers_b) | (np.isnan(numbers_a) & np.isnan(numbers_b))
    distance[same] = 0.0  # equal infinities, and two NaN
    return count, float(np.max(distance, initial=0.0))


def _numbers(words: Words, dtype: str) -> npt.NDArray[Any] | None:
    """The elements as float64 (complex128), flat; None for FP8 formats, of which only bits are
    compared."""
    flat = np.ascontiguousarray(words).reshape(-1)
    if dtype == "BF16":
        return cast(flat, "BF16", "F32").view(np.float32).astype(np.float64)
    if dtype not in _NUMPY:
        return None
    kind = np.complex128 if dtype == "C64" else np.float64
    return flat.view(_NUMPY[dtype]).astype(kind)


def _candidates(a: Source, b: Source, names_a: set[str], names_b: set[str]) -> list[set[str]]:
    """Tensors of each side that may be on the other side under another name."""

    def looks(source: Source, names: set[str]) -> dict[str, tuple[object, str]]:
        return {name: (source.shape(name), source.dtype(name)) for name in names}

    alone_a, alone_b = looks(a, names_a - names_b), looks(b, names_b - names_a)
    known_a, known_b = {*alone_a.values()}, {*alone_b.values()}
    return [
        {name for name, look in alone_a.items() if look in known_b},
        {name for name, look in alone_b.items() if look in known_a},
    ]


def _digests(source: Source, names: Sequence[str], reader: PortionReader) -> dict[str, str]:
    """A digest of shape, dtype and bytes of each tensor."""

    def digest(name: str) -> str:
        hasher = xxhash.xxh3_128(f"{source.dtype(name)} {source.shape(name)}".encode())
        limit = PORTION_BYTES // ITEM_BYTES[source.dtype(name)]
        for box in full_box(source.shape(name)).portions(limit):
            hasher.update(reader.read(name, box).values.data)
        return hasher.hexdigest()

    return dict(zip(names, in_parallel(digest, names, READERS), strict=True))


def _one_sided(
    only_a: set[str], only_b: set[str], digests_a: dict[str, str], digests_b: dict[str, str]
) -> Iterator[Row]:
    by_digest: dict[str, list[str]] = {}
    for name, digest in sorted(digests_b.items()):
        by_digest.setdefault(digest, []).append(name)
    taken = set()
    for name in sorted(only_a):
        matches = by_digest.get(digests_a.get(name, ""), [])
        if matches:
            taken.add(matches[0])
            yield Row(name, "renamed", f"is {matches.pop(0)} in B", 0.0)
        else:
            yield Row(name, "only in A")
    for name in sorted(only_b - taken):
        yield Row(name, "only in B")


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    file_suffix: str | None = None,
    src_strategy_dirs: str | os.PathLike[str] | None = None,
    filter_out_param_prefix: str = "",
) -> Difference:
    """The differences between the weights at two paths, of any layout or format.

    A path is a file, complete weights, a folder of rank folders with one save, or a file of one of
    several saves, of which `file_suffix` chooses one. `src_strategy_dirs`: strategy files that some
    rank files need. Raises `UserError`.
    """
    prefix, strategy = filter_out_param_prefix, src_strategy_dirs
    opened = [
        open_any_format(Path(path), file_suffix, None if strategy is None else Path(strategy))
        for path in (a, b)
    ]
    return compare(*opened, keep=lambda name: not prefix or not name.startswith(prefix))
