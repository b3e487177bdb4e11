"""Flash attention of variable lengths on a virtual GPU, computed by the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import models.flash_attention
import models.packed_attention
from tests.dry_run.virtual_cuda import DEVICE
from tests.models.test_packed_attention import flash_gradient, flash_reference


def _arguments(window: int | None, scale: float) -> dict[str, Any]:
    return {"scale": scale, "window_size_left": -1 if window is None else window - 1,
            "window_size_right": 0}  # fmt: skip


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cumulative: tuple[Tensor, Tensor, int, int],
    window: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `models.flash_attention.flash_forward`, in float32."""
    wide = (t.float() for t in (query, key, value))
    output, sums, *_ = flash_reference(
        *wide, *cumulative, 0.0, window is None, False, **_arguments(window, scale)
    )
    return output.to(query.dtype), sums


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    cumulative: tuple[Tensor, Tensor, int, int], window: int | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `models.flash_attention.flash_backward`, in float32."""
    wide = (t.float() for t in (gradient, query, key, value, output, logsumexp))
    empty = torch.empty(0)
    gradients = flash_gradient(
        *wide, *cumulative, 0.0, window is None, empty, empty, **_arguments(window, scale)
    )
    return tuple(found.to(query.dtype) for found in gradients)


@contextmanager
def flash_attention() -> Iterator[None]:
    """The operators of packed rows take the kernel of a GPU."""
    kernel_of = models.packed_attention.kernel_of

    def kernel_of_gpu(device: torch.device, dtype: torch.dtype, size: int) -> str:
        return kernel_of(DEVICE, dtype, size)

    with (
        patch.object(models.packed_attention, "kernel_of", kernel_of_gpu),
        patch.object(models.flash_attention, "flash_forward", _forward),
        patch.object(models.flash_attention, "flash_backward", _backward),
    ):
        yield
