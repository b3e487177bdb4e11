"""What steps cost: utilisation of the device, memory, and seconds of waiting for data.

Owns the measurements of a step beside those of the model. Invariants: reading them does not wait
for the device; memory is that of this process and, on CUDA, of its device, since the last reading.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    peak: int
    """CUDA: the most that tensors had since the last reading. CPU: the most that the process had
    resident since it began."""
    reserved: int | None
    """CUDA: the most that the allocator held since the last reading."""


@dataclass(kw_only=True)
class StepMeter:
    """Measures the steps of a run on this rank."""

    device: torch.device
    ranks: int
    flops_per_token: float | None = None
    """Operations of training on one token (`models.flops`); None: not known."""
    peak_flops: float | None = None
    """Operations a second of one device; None: not known."""
    _waited: float = 0.0

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation, 0 to 1: operations of the model as a share of what all devices
        could do. `tokens_per_second`: over all ranks. None where one of both is not known."""
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_second / (self.peak_flops * self.ranks)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The time inside counts as waiting for data."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def take_waited(self) -> float:
        """Seconds of waiting for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def take_memory(self) -> Memory:
        """The peak of memory, which begins again."""
        if self.device.type != "cuda":
            return Memory(resident_peak(), None)
        found = Memory(
            torch.cuda.max_memory_allocated(self.device),
            torch.cuda.max_memory_reserved(self.device),
        )
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


def resident_peak() -> int:
    """The most memory that this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
