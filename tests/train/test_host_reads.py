"""The host reads from the device in the places of `HOST_READS` alone, and as often as they say."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from launcher.host_reads import (
    HOST_READS,
    counted_host_reads,
    current_host_read,
    host_read,
)
from launcher.parallel.remembered import remembered, remembering
from tests.host_waits import HostWait, no_host_waits
from tests.parallel.parity import Case
from tests.ranks import run_ranks
from tests.workshop import Workshop

LAYERS_OF_EXPERTS = 3
SCALED = {"runner_wrapper": {"scale_sense": {"type": "DynamicLossScaleUpdateCell",
          "loss_scale_value": 4, "scale_factor": 2, "scale_window": 9}}}  # fmt: skip
RECOMPUTE = {"recompute_config": {"recompute": True}}
CASES: dict[str, tuple[Case, dict[str, int]]] = {
    "dense": (Case(dp=2), {"step values": 1}),
    "sharded": (Case(dp=2, sharded=True), {"step values": 1}),
    "tensor parallel": (Case(tp=2), {"step values": 1}),
    "a pipeline": (Case(pp=2), {"step values": 1}),
    "a loss scale": (Case(dp=2, more=SCALED), {"loss scale": 1}),
    "experts": (Case("qwen3 moe", dp=2), {"step values": 1}),
    "experts spread": (
        Case("deepseek", dp=2, ep=2), {"step values": 1, "expert counts": -1},
    ),
    "experts spread, recomputed": (
        Case("deepseek", dp=2, ep=2, more=RECOMPUTE), {"step values": 1, "expert counts": -1},
    ),
}  # fmt: skip
"""-1: once a layer of experts and micro-batch."""


def _steps(folder: str, cases: Sequence[Case]) -> list[tuple[Counter[str], int, str]]:
    """Of one step of each case: its reads, its layers of experts times micro-batches, and what a
    read in a wrong place raised."""
    from launcher.parallel import world as worlds
    from launcher.train.compute import BatchSharder
    from launcher.train.loop import train_steps
    from models.moe import MoE
    from tests.train.traces import Plan, _run

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    found = []
    for number, case in enumerate(cases):
        run = _run(Plan(case, steps=3), world, f"reads_{number}")
        modules = [m for part in run.model.parts.modules for m in part.modules()]
        train_steps(run)  # what the first step creates is not of the steps after it
        held = [*run.parameters]
        with no_host_waits(held) as marks, counted_host_reads() as reads:

            def moved(self: BatchSharder, tensor: torch.Tensor, marks: Any = marks) -> torch.Tensor:
                copy = tensor.clone()
                marks.add(copy)
                return copy

            plain, BatchSharder._moved = BatchSharder._moved, moved  # type: ignore[method-assign]
            try:
                train_steps(run)
            finally:
                BatchSharder._moved = plain  # type: ignore[method-assign]
        batches = len(run.loader.step(0).batches)
        layers = sum(isinstance(module, MoE) for module in modules)
        found.append((reads, layers * batches, _fault(run)))
        run.loader.close()
    worlds.stop()
    return found


def _fault(run: Any) -> str:
    """The error of a step in which a gradient is read."""
    from launcher.parallel.local import local
    from launcher.train.loop import train_steps

    finish = run.gradients.finish

    def early() -> None:
        finish()
        grads = [local(p.grad) for p in run.parameters if p.grad is not None]
        max(grads, key=torch.Tensor.numel).sum().item()

    object.__setattr__(run.gradients, "finish", early)
    try:
        with no_host_waits(run.parameters):
            train_steps(run)
    except HostWait as error:
        return str(error)
    return ""


def test_a_step_reads_from_the_device_where_it_is_listed(workshop: Workshop) -> None:
    cases = [case for case, _ in CASES.values()]
    for rank in run_ranks(2, _steps, str(workshop.folder), cases):
        for (name, (_, expected)), (reads, layers, fault) in zip(CASES.items(), rank, strict=True):
            wanted = {key: layers if n < 0 else n for key, n in expected.items()}
            assert dict(reads) == wanted, name
            assert "_local_scalar_dense" in fault, f"{name}: the test itself sees nothing"
            assert layers or "expert counts" not in expected


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t.tolist(),
        lambda t: t.detach().numpy(), lambda t: t.nonzero(), lambda t: t[t > 0],
        lambda t: t.cpu(), lambda t: int(t.argmax()), lambda t: (t * 2)[0].tolist(),
        lambda t: torch.zeros(3).add_(t).tolist(),
        lambda t: torch.ones(3).repeat_interleave(t.long()),
    ],
)  # fmt: skip
def test_every_kind_of_read_is_seen(read: Any) -> None:
    device = torch.tensor([1.0, 2.0, 0.0])
    with no_host_waits([device]):
        with pytest.raises(HostWait):
            read(device)
        with host_read("step values"):
            read(device)
        read(torch.ones(3))  # of the host


def test_reads_are_counted_by_reason_and_thread() -> None:
    assert current_host_read() is None
    seen: list[str | None] = []
    with counted_host_reads() as reads, host_read("tokens"):
        thread = threading.Thread(target=lambda: seen.append(current_host_read()))
        thread.start()
        thread.join()
        with host_read("group sizes"):
            seen.append(current_host_read())
        seen.append(current_host_read())
    assert seen == [None, "group sizes", "tokens"]
    assert reads == {"tokens": 1, "group sizes": 1}
    with pytest.raises(KeyError):
        host_read("something else")
    assert all(" " in how_often for how_often in HOST_READS.values())


def test_a_recomputation_takes_what_the_first_run_read() -> None:
    reads: list[int] = []

    def read() -> int:
        reads.append(len(reads))
        return reads[-1]

    def function(breaks: bool = False) -> list[int]:
        first = remembered(read)
        if breaks:
            raise KeyError("stopped early")
        return [first, remembered(read)]

    one, other = remembering(function), remembering(function)
    assert (one(), other()) == ([0, 1], [2, 3])
    with pytest.raises(KeyError):
        one(breaks=True)
    assert (one(), other(), one()) == ([0, 1], [2, 3], [0, 1])
    assert remembered(read) == 4, "outside of a checkpoint, every read is one"


def test_a_copy_to_the_host_keeps_the_values_of_its_time() -> None:
    from launcher.parallel.host_copy import HostCopy

    tensor = torch.tensor([1.0, 2.0])
    copy = HostCopy(tensor)
    tensor.zero_()
    with counted_host_reads() as reads:
        assert copy.read("step values") == copy.read("loss scale") == [1.0, 2.0]
    assert reads == {"step values": 1}, "it is read once"
