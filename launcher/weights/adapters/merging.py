"""The weights of a base with an adapter merged into them, a box at a time: W + scaling * B A.

Owns the formulas for files; computed in float32, from the values in the files. With DoRA each row
of the sum is scaled to its learned length (https://arxiv.org/abs/2402.09353). Torch-free.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.weights.adapters.config import Content, scaling_of
from launcher.weights.adapters.peft_files import MAGNITUDE, A, B, modules_of
from launcher.weights.adapters.tensors import Tensor, numbers_of, words_of
from launcher.weights.reading.transfer import Files
from launcher.weights.source import Source
from launcher.weights.streaming.cast import CASTS
from launcher.weights.streaming.portion import PortionReader, Words, slices

Numbers = npt.NDArray[np.float32]
SHOWN = 4
"""Names in a message."""


@dataclass(frozen=True)
class _Change:
    """The adapter of one weight [outputs, inputs], or [inputs, outputs] if `transposed`."""

    low: Numbers
    """A [rank, inputs]."""
    high: Numbers
    """scaling * B [outputs, rank]."""
    lengths: Numbers | None
    """Of the rows, with DoRA."""
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight in files."""
        shape = (self.high.shape[0], self.low.shape[1])
        return shape[::-1] if self.transposed else shape

    def added(self, weight: Numbers, box: Box) -> Numbers:
        """A box of the weight, with the product of both matrices."""
        rows, columns = slices(box)[:: -1 if self.transposed else 1]
        product = self.high[rows] @ self.low[:, columns]
        return np.add(weight, product.T if self.transposed else product, dtype=np.float32)


@dataclass
class Merging:
    """An adapter, in the form of PEFT, on its way into the weights of its base."""

    source: Source
    """The base, under the names of files."""
    changes: Mapping[str, _Change]
    replaced: Mapping[str, Tensor]
    """Weights that were saved in full."""
    _factors: dict[str, Numbers] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, name: str, box: Box, words: Words, dtype: str) -> tuple[Words, str]:
        """An `Edit` of a stream."""
        if name in self.replaced:
            tensor = self.replaced[name]
            return tensor.words[slices(box)], tensor.dtype
        change = self.changes.get(name)
        if change is None:
            return words, dtype
        merged = change.added(numbers_of(words, dtype), box)
        if change.lengths is not None:
            factors = self._factors_of(name, change)[slices(box)[int(change.transposed)]]
            merged = merged * (factors if change.transposed else factors[:, None])
        return words_of(merged, "F32"), "F32"

    def _factors_of(self, name: str, change: _Change) -> Numbers:
        """The learned length of each row divided by its present one."""
        with self._lock:
            if name not in self._factors:
                assert change.lengths is not None
                squares = np.zeros(len(change.lengths), np.float32)
                axis = 0 if change.transposed else 1
                with Files() as files:
                    reader = PortionReader(self.source, files)
                    for box in full_box(change.shape).portions(1 << 22):
                        numbers = numbers_of(reader.read(name, box).values, self.source.dtype(name))
                        sums = np.square(change.added(numbers, box)).sum(axis)
                        squares[slices(box)[1 - axis]] += sums
                self._factors[name] = np.divide(change.lengths, np.sqrt(squares), dtype=np.float32)
            return self._factors[name]


def merging(source: Source, tensors: Mapping[str, Tensor], config: Content) -> Merging:
    """What merges the adapter `tensors`, with names of files and their description `config`, into
    the weights of `source`. Raises `UserError` for what does not fit them."""
    changes, own = {}, set()
    for module in modules_of(tensors):
        parts = {kind: tensors.get(module + kind) for kind in (A, B, MAGNITUDE)}
        own |= {module + kind for kind in parts}
        changes[f"{module}.weight"] = _change(module, parts, config)
    for name in tensors.keys() - own:
        if ".lora_" in name:
            raise UserError(
                f"the adapter has `{name}`, and not both matrices of this layer",
                rule=f"a layer has `{A}` and `{B}`", advice="Copy the adapter again",
            )  # fmt: skip
    replaced = {name: tensor for name, tensor in tensors.items() if name not in own}
    optional = [
        name for name in replaced if _is_alias(name, replaced) and name not in source.tensors
    ]
    replaced = {name: tensor for name, tensor in replaced.items() if name not in optional}
    _check(source, changes, replaced)
    return Merging(source, changes, replaced)


def _change(module: str, parts: Mapping[str, Tensor | None], config: Content) -> _Change:
    low, high, lengths = parts[A], parts[B], parts[MAGNITUDE]
    missing = B if high is None else MAGNITUDE if config.get("use_dora") and lengths is None else ""
    if low is None or high is None or missing:
        raise UserError(
            f"the adapter has `{module}{A}` and no `{module}{missing}`",
            rule="a layer has both matrices, and with DoRA the lengths of its rows",
            advice="Copy the adapter again",
        )
    return _Change(
        low.numbers, high.numbers * np.float32(scaling_of(config, module)),
        None if lengths is None else lengths.numbers.reshape(-1),
        transposed=bool(config.get("fan_in_fan_out")),
    )  # fmt: skip


def _is_alias(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether another of `tensors` is the same: both ends of tied embeddings."""
    own = tensors[name].words
    return any(
        other != name and own.shape == tensor.words.shape and np.array_equal(own, tensor.words)
        for other, tensor in tensors.items()
    )


def _check(source: Source, changes: Mapping[str, _Change], replaced: Mapping[str, Tensor]) -> None:
    """Check that the base has what the adapter changes, of the same shape and in floats."""
    shapes = {name: change.shape for name, change in changes.items()}
    shapes |= {name: tensor.words.shape for name, tensor in replaced.items()}
    missing = sorted(shapes.keys() - source.tensors.keys())
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise UserError(
            f"the base has no {', '.join(f'`{name}`' for name in missing[:SHOWN])}{more}",
            where=str(source.path), rule="the adapter changes them",
            advice="Give the base of the adapter (--pretrained_model_dir)",
        )  # fmt: skip
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            raise UserError(
                f"`{name}` is {list(source.shape(name))}, the adapter is for {list(shape)}",
                where=str(source.path), rule="an adapter belongs to one model",
                advice="Give the base of the adapter (--pretrained_model_dir)",
            )  # fmt: skip
        if source.dtype(name) not in CASTS:
            raise UserError(
                f"`{name}` is {source.dtype(name)}", where=str(source.path),
                rule=f"an adapter is merged into {', '.join(CASTS)}",
                advice="Give a base that is not quantized",
            )  # fmt: skip
