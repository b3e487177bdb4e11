"""The trained parameters of a model, and what an optimizer needs to know about each.

Computed from the full model, which may be on the meta device: the same on every rank and layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.build import blocks
from models.initial import no_weight_decay


@dataclass(frozen=True)
class TrainedParameter:
    """Properties of one trained parameter."""

    decays: bool
    """Weight decay applies: not to biases and norm weights."""
    is_matrix: bool = False
    """A weight matrix of a hidden layer, or a stack of them: not an embedding, output head, norm or
    bias. Optimizers for matrices (Muon) update these."""


def trained_parameters(model: nn.Module) -> dict[str, TrainedParameter]:
    """Every parameter of `model` that requires gradients, by name."""
    hidden = _hidden_matrices(model)
    return {
        name: TrainedParameter(not no_weight_decay(name, p.ndim), is_matrix=id(p) in hidden)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the parameters of repeated layers that multiply hidden states."""
    return {
        id(parameter)
        for block in blocks(model)
        for module in block.modules()
        if not isinstance(module, nn.Embedding)
        for leaf, parameter in module.named_parameters(recurse=False)
        if _is_matrix(leaf, parameter)
    }


def _is_matrix(leaf: str, parameter: nn.Parameter) -> bool:
    """A `weight` of two dims, or a stack of matrices of experts."""
    if parameter.ndim == 2:
        return leaf == "weight"
    return parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and not leaf.endswith("bias")
