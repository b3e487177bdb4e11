"""What a step costs: utilisation, waiting, and the memory of a device through a fake of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from launcher.train import meter as meters
from launcher.train.meter import Memory, StepMeter


def test_utilisation_is_over_all_devices() -> None:
    meter = StepMeter(
        device=torch.device("cpu"), ranks=4, flops_per_token=6e9, peak_flops=1e15
    )  # fmt: skip
    assert meter.mfu(250_000.0) == pytest.approx(6e9 * 250_000 / 4e15)


@pytest.mark.parametrize(("flops", "peak"), [(None, 1e15), (6e9, None)])
def test_no_utilisation_without_both(flops: float | None, peak: float | None) -> None:
    meter = StepMeter(device=torch.device("cpu"), ranks=1, flops_per_token=flops, peak_flops=peak)
    assert meter.mfu(1.0) is None


def test_waiting_is_counted_until_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 2.0, 2.25])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    meter = StepMeter(device=torch.device("cpu"), ranks=1)
    for _ in range(2):
        with meter.waiting_for_data():
            pass
    assert (meter.take_waited(), meter.take_waited()) == (0.75, 0.0)


@dataclass
class FakeMemory:
    """Of `torch.cuda`: the peak since it was reset."""

    peaks: list[int]
    resets: list[torch.device] = field(default_factory=list)

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peaks[len(self.resets)]

    def max_memory_reserved(self, device: torch.device) -> int:
        return 2 * self.peaks[len(self.resets)]

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.resets.append(device)


def test_memory_of_a_device_is_that_since_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = FakeMemory([30, 20, 0]), torch.device("cuda", 1)
    monkeypatch.setattr(meters.torch, "cuda", fake)
    meter = StepMeter(device=device, ranks=1)
    assert [meter.take_memory(), meter.take_memory()] == [Memory(30, 60), Memory(20, 40)]
    assert fake.resets == [device, device]


def test_memory_of_the_process_on_the_cpu() -> None:
    found = StepMeter(device=torch.device("cpu"), ranks=1).take_memory()
    assert found.peak > 10 << 20
    assert found.reserved is None
