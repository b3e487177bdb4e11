"""What torch's own tables say of its operations on CUDA."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

STAND_INS = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}
"""Kernels of the CPU in place of which a GPU has others of the same operation."""
_KERNELS = {"CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd",
            "CompositeExplicitAutogradNonFunctional"}  # fmt: skip
_RAISING = {
    "histc", "put_", "kthvalue.values", "median.dim_values", "nll_loss2d_forward",
    "_ctc_loss_backward", "grid_sampler_2d_backward", "max_unpool2d", "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward", "upsample_linear1d_backward", "reflection_pad1d_backward",
}  # fmt: skip
"""`torch.use_deterministic_algorithms` documents that these raise on CUDA."""


def name_of(operation: OpOverload) -> str:
    """As in `native_functions.yaml`: `add.Tensor`, `_local_scalar_dense`."""
    overload = operation._schema.overload_name
    name = operation._schema.name.removeprefix("aten::")
    return f"{name}.{overload}" if overload else name


@cache
def without_cuda() -> frozenset[str]:
    """The operations of torch that have a kernel for the CPU and none for CUDA."""
    import torchgen

    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    kernels: dict[str, set[str]] = {}
    delegates: dict[str, str] = {}
    name = ""
    for line in path.read_text().splitlines():
        if found := re.match(r"- func: ([\w.]+)\(", line):
            name = found[1]
            kernels[name] = set()
        elif found := re.match(r"  structured_delegate: ([\w.]+)", line):
            delegates[name] = found[1]
        elif found := re.match(r"    (\w+(?:, \w+)*): \S+", line):
            kernels[name] |= set(found[1].split(", "))
    return frozenset(
        name
        for name in kernels
        if "CPU" in (found := kernels[delegates.get(name, name)]) and not found & _KERNELS
    )


def raises_when_deterministic(name: str, arguments: Sequence[Any]) -> bool:
    """Whether a GPU would refuse this operation in deterministic mode."""
    if name in ("cumsum", "cumsum_", "cumsum.out"):  # but sums of integers are exact
        return isinstance(arguments[0], Tensor) and arguments[0].is_floating_point()
    if name == "bincount":
        return len(arguments) > 1 and arguments[1] is not None
    return name in _RAISING
