"""Small tensors on their way from the device to the host.

Owns the copy that is begun long before its values are needed: to pinned memory, with an event
behind it. Reading waits for that event alone, not for what was queued after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launcher.host_reads import host_read


class HostCopy:
    """A copy of a tensor, begun when this is created. The tensor may be overwritten afterwards by
    what is queued on its stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._values = tensor.to("cpu", non_blocking=True)  # which allocates pinned memory
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._values = tensor.clone()
        self._list: Any = None

    def read(self, reason: str) -> Any:
        """The values as `Tensor.tolist` gives them; the host waits for the copy in the first call.
        `reason`: one of `HOST_READS`."""
        if self._list is None:
            with host_read(reason):
                if self._done is not None:
                    self._done.synchronize()
                self._list = self._values.tolist()
        return self._list
