"""The tensors of an adapter in memory, as numpy arrays: adapters are small. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.weights.reading.transfer import Files
from launcher.weights.source import Source
from launcher.weights.streaming.audit import Audit
from launcher.weights.streaming.cast import CASTS, FLOATS, cast
from launcher.weights.streaming.portion import PortionReader, Words


@dataclass(frozen=True)
class Tensor:
    """A tensor: safetensors dtype, and the bits of its elements."""

    dtype: str
    words: Words

    @property
    def numbers(self) -> npt.NDArray[np.float32]:
        """Its values in float32."""
        return numbers_of(self.words, self.dtype)

    @staticmethod
    def of(numbers: npt.NDArray[np.float32], dtype: str) -> Tensor:
        """A tensor of `dtype` with these values, rounded to nearest."""
        return Tensor(dtype, words_of(numbers, dtype))


def numbers_of(words: Words, dtype: str) -> npt.NDArray[np.float32]:
    """The values of bits of `dtype`, in float32."""
    return cast(words.reshape(-1), dtype, "F32").view(FLOATS["F32"]).reshape(words.shape)


def words_of(numbers: npt.NDArray[np.float32], dtype: str) -> Words:
    """The bits of numbers in `dtype`, rounded to nearest."""
    flat = np.ascontiguousarray(numbers, np.float32).reshape(-1).view(np.uint32)
    return cast(flat, "F32", dtype).reshape(numbers.shape)


def read_tensors(source: Source, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of `source` whose name passes `keep`. Raises `UserError` for what is not a tensor
    of floating numbers, and where the files do not have their checksums."""
    found = {}
    with Files() as files:
        reader = PortionReader(source, files)
        audit = Audit(source, reader.descriptor)
        for name in filter(keep, source.tensors):
            if source.dtype(name) not in CASTS:
                raise UserError(
                    f"`{name}` is {source.dtype(name)}", where=str(source.path),
                    rule=f"tensors of an adapter are {', '.join(CASTS)}",
                )  # fmt: skip
            portion = reader.read(name, full_box(source.shape(name)))
            for taken in portion.taken:
                audit.take(taken)
            found[name] = Tensor(source.dtype(name), portion.values)
        audit.finish()
    return found
