"""Casts between the floating dtypes, on bits, without torch: numpy has no bfloat16.

Rounds to nearest, ties to even, as torch does; NaN stays NaN.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from launcher.weights.streaming.portion import Words

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
CASTS = (*FLOATS, "BF16")
"""Dtypes that can be cast, from and to."""


def cast(words: Words, source: str, target: str) -> Words:
    """The bits in dtype `target` of the numbers that `words` are in dtype `source`."""
    if source == target:
        return words
    if source == "BF16":
        numbers: npt.NDArray[np.floating] = _from_bfloat16(words)
    else:
        numbers = np.ascontiguousarray(words).view(FLOATS[source])
    if target == "BF16":
        return _to_bfloat16(numbers)
    with np.errstate(over="ignore"):  # overflow becomes infinity, as in torch
        values = numbers.astype(FLOATS[target])
    return values.view(f"u{values.itemsize}")


def _from_bfloat16(words: Words) -> npt.NDArray[np.float32]:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(numbers: npt.NDArray[np.floating]) -> Words:
    with np.errstate(over="ignore"):
        single = numbers.astype(np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    rounded[np.isnan(single)] = 0x7FC0
    return rounded.astype(np.uint16)
