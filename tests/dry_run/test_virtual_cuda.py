"""The virtual GPU finds what a GPU would not do: in the forward, in the backward, in the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.host_reads import host_read
from tests.dry_run.cuda_calls import fake_cuda
from tests.dry_run.virtual_cuda import DEVICE, DeviceError, VirtualCuda


@pytest.fixture
def device() -> Iterator[VirtualCuda]:
    with fake_cuda(), VirtualCuda() as found:
        yield found


class InBackward(torch.autograd.Function):
    """The identity; `action` with the gradient in its backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, action: Callable[[Tensor], Any]) -> Tensor:
        ctx.action = action
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.action(gradient)
        return gradient, None


FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda t: t.sum().item(), "waits"),
    "tolist": (lambda t: t.tolist(), "waits"),
    "bool": (lambda t: bool(t.isfinite().all()), "waits"),
    "if": (lambda t: 1 if (t > 0).any() else 0, "waits"),
    "float": (lambda t: float(t.sum()), "waits"),
    "cpu": (lambda t: t.cpu(), "waits"),
    "to the host": (lambda t: t.to("cpu"), "waits"),
    "copy to the host": (lambda t: torch.empty(t.shape).copy_(t), "waits"),
    "nonzero": (lambda t: t.nonzero(), "waits"),
    "selection by a mask": (lambda t: t[t > 0], "waits"),
    "repeats on the device": (lambda t: t.ravel().repeat_interleave(t.ravel().long()), "waits"),
    "a tensor of the CPU": (lambda t: t + torch.ones(4), "of the CPU"),
    "an index of the CPU": (lambda t: t[torch.arange(2)], "of the CPU"),
    "a mask of the CPU": (lambda t: t.where(torch.ones(4) > 0, t), "of the CPU"),
    "a product with the CPU": (lambda t: t @ torch.ones(4, 4), "of the CPU"),
    "an update from the CPU": (lambda t: t.detach().clone().add_(torch.ones(4)), "of the CPU"),
    "a sum without order": (lambda t: t.detach().cumsum(-1), "deterministic"),
    "a kernel of the CPU alone": (lambda t: torch.ops.aten._add_relu(t, t), "no kernel"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", ["forward", "backward", "recompute", "update"])
def test_faults_are_found(device: VirtualCuda, fault: str, place: str) -> None:
    action, words = FAULTS[fault]

    def step(weight: torch.nn.Parameter) -> None:
        states = torch.ones(2, 4, device=DEVICE) * weight
        if place == "forward":
            action(states.detach())
        elif place == "backward":
            states = InBackward.apply(states, action)
        elif place == "recompute":
            states = torch.utils.checkpoint.checkpoint(again, states, use_reentrant=False)
        states.square().sum().backward()
        if place == "update":
            action(weight.detach())

    runs = 0

    def again(states: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 2:
            action(states.detach())
        return states.exp()

    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises((DeviceError, RuntimeError), match=words):
            device.strict(step)(torch.nn.Parameter(torch.ones(4, device=DEVICE)))
    finally:
        torch.use_deterministic_algorithms(was)


def test_a_step_without_faults(device: VirtualCuda) -> None:
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)

    def step() -> Tensor:
        rows = torch.arange(8.0).view(2, 4).pin_memory().to(DEVICE, non_blocking=True)
        loss = (rows * weight * 2.0 + torch.tensor(1.0)).square().sum()
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.is_cuda
        optimizer.step()
        with host_read("loss scale"):
            loss.item()
        return loss

    assert device.strict(step)().device == DEVICE
    assert device.reads == ["loss scale"]
    assert torch.ones(3).device.type == "cpu"


def test_tensors_of_a_backward_pass_need_a_device_too(
    device: VirtualCuda,
) -> None:
    weight = torch.ones(4, device=DEVICE, requires_grad=True)
    with pytest.raises(DeviceError, match="of the CPU"):
        InBackward.apply(weight, lambda gradient: gradient + torch.zeros(4)).sum().backward()
    InBackward.apply(
        weight, lambda gradient: gradient + torch.zeros_like(gradient)
    ).sum().backward()
    assert weight.grad is not None
    assert weight.grad.device == DEVICE
