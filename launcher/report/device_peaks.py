"""The peak speed of devices, for model FLOPs utilisation (MFU).

Owns the table. Figures are those of the vendors' data sheets for dense matrices (without the
doubling for sparse ones), in TFLOP/s at the full power of the device, accumulating in float32. A
device that is not listed has no peak: set `device_peak_tflops`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

TERA = 1e12


class Peak(NamedTuple):
    """TFLOP/s of one device; None: it has no such units."""

    half: float | None
    """bfloat16 and float16."""
    tf32: float | None
    """float32 matrices that are multiplied in TF32."""
    single: float
    """float32."""


PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"GB300|GB200", Peak(2500.0, 1250.0, 80.0)),
    (r"B300|B200", Peak(2250.0, 1120.0, 75.0)),
    (r"(H100|H200).*NVL", Peak(835.5, 417.5, 60.0)),
    (r"GH200|H200", Peak(989.4, 494.7, 66.9)),
    (r"(H100|H800).*PCIe", Peak(756.5, 378.0, 51.2)),
    (r"H100|H800", Peak(989.4, 494.7, 66.9)),
    (r"\bH20\b", Peak(148.0, 74.0, 44.0)),
    (r"A100|A800", Peak(312.0, 156.0, 19.5)),
    (r"\bA30\b", Peak(165.0, 82.0, 10.3)),
    (r"\bL40S\b", Peak(362.05, 183.0, 91.6)),
    (r"\bL40\b", Peak(181.05, 90.5, 90.5)),
    (r"\bL4\b", Peak(121.0, 60.0, 30.3)),
    (r"RTX 6000 Ada", Peak(364.2, 182.1, 91.1)),
    (r"RTX A6000", Peak(154.8, 77.4, 38.7)),
    (r"RTX 5090", Peak(209.5, 104.8, 104.8)),
    (r"RTX 4090", Peak(165.2, 82.6, 82.6)),
    (r"RTX 3090", Peak(71.0, 35.6, 35.6)),
    (r"\bA10\b", Peak(125.0, 62.5, 31.2)),
    (r"MI355X", Peak(2500.0, None, 157.3)),
    (r"MI325X|MI300X", Peak(1307.4, 653.7, 163.4)),
)
"""Regular expression for the name of a device -> its peak; the first one that matches counts."""


def peak_flops(device_name: str, dtype: torch.dtype, *, uses_tf32: bool = False) -> float | None:
    """Operations a second of a device in matrix products of `dtype`; None where it is not known.

    `uses_tf32`: whether products of float32 are computed in TF32.
    """
    for pattern, peak in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            if dtype in (torch.bfloat16, torch.float16):
                found = peak.half
            elif dtype == torch.float32:
                found = peak.tf32 if uses_tf32 else peak.single
            else:
                return None
            return None if found is None else found * TERA
    return None


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """`peak_flops` of a device of this process: None on the CPU."""
    if device.type != "cuda":
        return None
    uses_tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), dtype, uses_tf32=uses_tf32)
