"""Copies between the host and a virtual GPU: those that the host would wait for are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from launcher.host_reads import host_read
from tests.dry_run.cuda_calls import fake_cuda
from tests.dry_run.virtual_cuda import DEVICE, STAGED_BYTES, DeviceError, VirtualCuda

LARGE = STAGED_BYTES // 4 + 1
"""Elements in float32."""

WAITS: dict[str, Callable[[Tensor], object]] = {
    "values": lambda t: torch.tensor([1.0, 2.0], device=DEVICE),
    "a number": lambda t: torch.as_tensor(1.0, device="cuda"),
    "to": lambda t: torch.ones(2).to(DEVICE),
    "to a type": lambda t: torch.ones(2).to(DEVICE, torch.bfloat16),
    "to as another": lambda t: torch.ones(2).to(t),
    "cuda": lambda t: torch.ones(2).cuda(),
    "copy": lambda t: torch.empty(4, device=DEVICE).copy_(torch.ones(4)),
    "an assignment": lambda t: t.clone().__setitem__(0, torch.ones(4)),
    "several copies": lambda t: torch._foreach_copy_([t.clone()], [torch.ones(2, 4)]),
    "pinned, but not queued": lambda t: torch.ones(2).pin_memory().to(DEVICE),
    "queued, but large": lambda t: torch.ones(LARGE).to(DEVICE, non_blocking=True),
    "a large copy": lambda t: torch.empty(LARGE, device=DEVICE).copy_(torch.ones(LARGE), True),
    "a large one back": lambda t: torch.empty(LARGE).copy_(
        torch.ones(LARGE, device=DEVICE), non_blocking=True
    ),
}  # fmt: skip
QUEUED: dict[str, Callable[[Tensor], object]] = {
    "small": lambda t: torch.tensor([1.0, 2.0]).to(DEVICE, non_blocking=True),
    "small, by position": lambda t: torch.ones(2).to(DEVICE, torch.bfloat16, True),
    "pinned": lambda t: torch.ones(LARGE).pin_memory().to(DEVICE, non_blocking=True),
    "part of a pinned one": lambda t: torch.empty(2, LARGE, pin_memory=True)[1].to(
        DEVICE, non_blocking=True
    ),
    "a pinned copy": lambda t: torch.empty(LARGE, device=DEVICE).copy_(
        torch.ones(LARGE).pin_memory(), non_blocking=True
    ),
    "back": lambda t: torch.ones(LARGE, device=DEVICE).to("cpu", non_blocking=True),
    "back and forth": lambda t: torch.ones(LARGE, device=DEVICE)
    .to("cpu", non_blocking=True)
    .to(DEVICE, non_blocking=True),
    "made there": lambda t: torch.full((2,), 1.0, device=DEVICE) + torch.arange(2, device="cuda"),
    "a number in place": lambda t: t.clone().fill_(2.0).masked_fill_(t > 0, 3.0),
    "a tensor of there": lambda t: torch.as_tensor(t, device=DEVICE),
}  # fmt: skip


@pytest.fixture
def device() -> Iterator[VirtualCuda]:
    with fake_cuda(), VirtualCuda() as found:
        yield found


@pytest.mark.parametrize("copy", WAITS)
def test_copies_that_wait(device: VirtualCuda, copy: str) -> None:
    states = torch.ones(2, 4, device=DEVICE)
    WAITS[copy](states)  # where nothing is strict
    with pytest.raises(DeviceError, match="waits"):
        device.strict(WAITS[copy])(states)
    with host_read("loss scale"):
        device.strict(WAITS[copy])(states)
    assert device.reads == ["loss scale"]


@pytest.mark.parametrize("copy", QUEUED)
def test_copies_that_are_queued(device: VirtualCuda, copy: str) -> None:
    device.strict(QUEUED[copy])(torch.ones(2, 4, device=DEVICE))
    assert not device.reads
