"""A fault that is planted in a step of a real run is found by the dry run, wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.dry_run.driver import dry_run_on_rank
from tests.parallel.parity import Case
from tests.ranks import run_ranks
from tests.workshop import Workshop

CASES = [Case(model={"compute_dtype": "bfloat16"}, more={"compile": False})]


def _in_layer(fault: Callable[[Any], Any]) -> None:
    from models.decoder import DecoderLayer

    forward = DecoderLayer.forward

    def faulty(self: Any, states: Any, context: Any) -> Any:
        return forward(self, fault(states), context)

    DecoderLayer.forward = faulty  # type: ignore[method-assign]


def _in_backward(fault: Callable[[Any], Any]) -> None:
    from launcher.train import loss

    scale_rows = loss.scale_rows
    loss.scale_rows = lambda gradient, scale: scale_rows(fault(gradient), scale)


def _in_update(fault: Callable[[Any], Any]) -> None:
    from launcher.parallel.local import local
    from launcher.train.optimizer import Optimizer

    step = Optimizer.step

    def faulty(self: Any, rate: float) -> None:
        for parameter in next(iter(self.parts)).param_groups[0]["params"]:
            fault(local(parameter.grad))
        step(self, rate)

    Optimizer.step = faulty  # type: ignore[method-assign]


def _item(tensor: Any) -> Any:
    tensor.sum().item()
    return tensor


def _cpu_tensor(tensor: Any) -> Any:
    import torch

    return tensor + torch.zeros(tensor.shape[-1:], dtype=tensor.dtype)


PLACES = {"layer": _in_layer, "backward": _in_backward, "update": _in_update}
FAULTS = {"item": (_item, "waits for a value"), "cpu tensor": (_cpu_tensor, "of the CPU among")}


def _planted(folder: str, place: str, fault: str) -> str:
    """The error of a dry run with this fault."""
    PLACES[place](FAULTS[fault][0])
    (found,) = dry_run_on_rank(folder, CASES)
    return found.error


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(workshop: Workshop, place: str, fault: str) -> None:
    (error,) = run_ranks(1, _planted, str(workshop.folder), place, fault)
    assert "DeviceError" in error, error
    assert FAULTS[fault][1] in error, error
