"""The peak of a device by its name, as `torch.cuda.get_device_name` gives it."""

from __future__ import annotations

import pytest
import torch

from launcher.report.device_peaks import TERA, peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.5, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H200 NVL", 835.5, 60.0),
        ("NVIDIA H800 PCIe", 756.5, 51.2),
        ("NVIDIA GH200 480GB", 989.4, 66.9),
        ("NVIDIA H20", 148.0, 44.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A10", 125.0, 31.2),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
        ("NVIDIA B200", 2250.0, 75.0),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("AMD Instinct MI300X", 1307.4, 163.4),
    ],
)
def test_names_of_devices(name: str, half: float, single: float) -> None:
    assert peak_flops(name, torch.bfloat16) == half * TERA
    assert peak_flops(name, torch.float16) == half * TERA
    assert peak_flops(name, torch.float32) == single * TERA


def test_float32_may_be_multiplied_in_tf32() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32, uses_tf32=True) == 494.7 * TERA


@pytest.mark.parametrize("name", ["NVIDIA A10G", "Tesla T4", "NVIDIA GeForce GTX 1080", ""])
def test_other_devices_have_none(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


def test_the_cpu_and_other_dtypes_have_none() -> None:
    assert peak_of(torch.device("cpu"), torch.float32) is None
    assert peak_flops("NVIDIA H200", torch.float64) is None
