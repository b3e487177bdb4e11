"""The numbers of a run that MindSpore keeps beside complete weights, in `hyper_param.safetensors`.

Names, dtypes and shapes are those that MindFormers' CheckpointMonitor writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from launcher.mindspore.names import BATCH, EPOCH, SCALE
from launcher.weights.formats.safetensors import in_file_order
from launcher.weights.streaming.write import Part

_KINDS: dict[str, tuple[str, tuple[int, ...], Any]] = {
    EPOCH: ("I64", (), np.int64),
    "step_num": ("I64", (), np.int64),
    BATCH: ("I64", (), np.int64),
    "global_step": ("I32", (1,), np.int32),
    SCALE: ("F32", (1,), np.float32),
}
"""Name to dtype in safetensors, shape, dtype in numpy."""


def numbers_of(state: Mapping[str, Any], epoch: int) -> list[Part]:
    """What is written for the state file of a save made in `epoch`; numbers that it does not have
    are left out."""
    found = {
        EPOCH: epoch, "step_num": state.get("global_step"), BATCH: state.get("global_batch_size"),
        "global_step": state.get("updates"), SCALE: state.get("loss_scale"),
    }  # fmt: skip
    return in_file_order(
        _part(name, value) for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    )  # fmt: skip


def _part(name: str, value: float) -> Part:
    dtype, shape, kind = _KINDS[name]
    return Part(name, dtype, shape, partial(_between, np.array([value], kind).tobytes()))


def _between(content: bytes, start: int, stop: int) -> memoryview:
    return memoryview(content)[start:stop]
