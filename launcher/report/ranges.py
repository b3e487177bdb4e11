"""Named ranges: what a trace calls the parts of a step.

Owns their names. A range costs nothing while nothing records. With `mark_for_nsight` ranges are
NVTX ranges too, which Nsight Systems shows beside the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

DATA, FORWARD, BACKWARD, CLIP, OPTIMIZER = "data", "forward", "backward", "clip", "optimizer"
PIPELINE = "pipeline"
"""Forward and backward passes of all micro-batches, in the order of the schedule, which torch
names."""
SAVE, EVALUATE = "save", "evaluate"
NAMES = (DATA, FORWARD, BACKWARD, CLIP, OPTIMIZER, PIPELINE, SAVE, EVALUATE)


class _Marks:
    """Whether ranges are NVTX ranges too."""

    nsight = False


def mark_for_nsight(is_on: bool) -> None:
    """Switch NVTX ranges on or off; on only where there is CUDA."""
    _Marks.nsight = is_on


def named_range(name: str) -> AbstractContextManager[object]:
    """A range of this name in the trace that is being recorded, if one is."""
    if _Marks.nsight:
        return _both(name)
    if torch.autograd.profiler._is_profiler_enabled:
        return record_function(name)
    return nullcontext()


@contextmanager
def _both(name: str) -> Iterator[None]:
    with torch.cuda.nvtx.range(name), record_function(name):
        yield
