"""The leaf modules that hold parameters, and the hook through which parallelism changes them.

Invariant: a leaf computes with `held(name)` only, never with the parameter itself. What parallelism
does between a stored parameter and its use (select rows, detach it) is a function in `views`, set
from outside; no leaf depends on ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.products import infers, linear
from models.spec import DecoderConfig, Precision

if TYPE_CHECKING:
    from models.attention import StepContext
    from models.lora import LowRank

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Module(nn.Module):
    """`nn.Module` whose unknown attributes are type errors. Torch declares that every attribute may
    be a tensor or a module, so that a misspelled one would pass."""

    if TYPE_CHECKING:

        def __getattr__(self, name: Never) -> Any: ...  # type: ignore[override]


class Leaf(Module):
    """A module with its own parameters, which are initialized by `models.initial` or from files."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, Callable[[Tensor], Tensor]] = {}

    def held(self, name: str) -> Tensor:
        """The parameter `name` as used in the computation; None for a missing bias."""
        parameter = getattr(self, name)
        view = self.views.get(name)
        return parameter if view is None or parameter is None else view(parameter)


class Linear(Leaf):
    """`states` [..., inputs] -> [..., outputs]; weight [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)
        self.adapter: LowRank | None = None
        """The low-rank adapter, whose matrices are `lora_A` and `lora_B`."""
        self.lora_A: Linear | None = None
        self.lora_B: Linear | None = None
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
        """The matrix product: another precision may be set from outside."""

    def forward(self, states: Tensor, context: StepContext | None = None) -> Tensor:
        """`context` of the step, for the dropout of an adapter."""
        output = self.product(states, self.held("weight"), self.held("bias"))
        return output if self.adapter is None else self.adapter.add(self, states, output, context)


class Embedding(Leaf):
    """Token ids [...] -> [..., size]; weight [vocabulary, size]."""

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, size))

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.held("weight"))


class TiedHead(Leaf):
    """The head of a model with tied embeddings: no parameter, but its own views of the embedding's
    weight."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it does not become a child

    @property
    def weight(self) -> nn.Parameter:
        """The embedding's current parameter, even if it was replaced."""
        return self._embedding[0].weight

    def forward(self, states: Tensor, context: StepContext | None = None) -> Tensor:
        """As `Linear.forward`."""
        return linear(states, self.held("weight"))


class RMSNorm(Leaf):
    """Root-mean-square norm over the last dimension, statistics in `compute_dtype`."""

    def __init__(self, size: int, eps: float, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.compute_dtype = eps, compute_dtype

    def forward(self, states: Tensor) -> Tensor:
        if infers() and self.compute_dtype == _opmath(states.dtype):
            # The same operations in one call; the gradient of this one has other roundings.
            normed = F.rms_norm(states, states.shape[-1:], None, self.eps)
            return self.held("weight") * normed
        wide = states.to(self.compute_dtype)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.held("weight") * wide.to(states.dtype)


class MLP(Module):
    """The gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(
        self, hidden: int, inner: int, activation: str, *, bias: bool = False,
        down_bias: bool = False,
    ) -> None:  # fmt: skip
        """`bias`: on all projections; `down_bias`: on the last one."""
        super().__init__()
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias or down_bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        gate, up = self.gate_proj(states, context), self.up_proj(states, context)
        return self.activated(gate, up, context)

    def activated(self, gate: Tensor, up: Tensor, context: StepContext) -> Tensor:
        """From both projections [..., inner] to the output. Parallelism may replace this attribute
        of an instance by a function of the same arguments, which may call this one."""
        return self.down_proj(self.activation(gate) * up, context)


def _opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels of torch compute with floating-point `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_of(config: DecoderConfig, precision: Precision, size: int) -> RMSNorm:
    """The configured RMS norm over `size`."""
    return RMSNorm(size, config.rms_norm_eps, dtype_of(precision.layernorm_compute_dtype))


def dtype_of(name: str) -> torch.dtype:
    """`float32` -> torch.float32."""
    return getattr(torch, name)
