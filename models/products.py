"""Matrix products of the layers: `F.linear`, and where it is slow a faster kernel for inference.

Invariant: outside of `torch.inference_mode` the result is that of `F.linear` bit by bit, so that
training and evaluation do not depend on this file.

On the CPU, `F.linear` multiplies float32 with MKL, which reads weights at a fraction of the memory
bandwidth where there are few rows (a decoding step), and on processors of other makers at a half to
a third of the speed where there are many. oneDNN, which torch is built with and uses for bfloat16,
takes the same tensors without a copy; `python -m benchmarks.decoding --products` shows both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch has the operator that torch.compile uses for linear layers on the CPU."""


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states` [..., inputs] times `weight` [outputs, inputs], plus `bias` [outputs]: [...,
    outputs]. All have one dtype."""
    if infers() and _by_onednn(states, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return F.linear(states, weight, bias)


def infers() -> bool:
    """Whether nothing is differentiated now or later, nor traced."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _by_onednn(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _ONEDNN
        and weight.dtype == states.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and weight.device.type == states.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter)  # no shard of FSDP or other subclass
        and weight.is_contiguous()
        and states.numel() > 0
    )
