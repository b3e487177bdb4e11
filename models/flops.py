"""Floating-point operations of training on a token, as torchtitan and PaLM count them.

The formula is that of PaLM (https://arxiv.org/abs/2204.02311, appendix B), `6 N + 12 L h S` for a
dense model with everything trained: N parameters, L layers, h the sizes of all heads of a layer
together, S tokens of a row. In detail, a multiplication and an addition being two operations:

- Every parameter but those of embeddings counts 2 in the forward pass, 2 for the gradient of its
  input and 2 for its own. A table that is the output head too counts once, as the head.
- Of a stack of experts a token uses `experts_per_token / num_experts`.
- A query attends to S keys (to a window, where the layer has one), which counts 2 (d_qk + d_v) a
  head and key in the forward pass and twice that in the backward pass. A causal row is counted as
  if every token saw all of it, and a packed row as if it were one document.
- A frozen parameter has no gradient of its own; below the first layer with trained parameters there
  is no backward pass at all.
- Nothing is counted that is computed again (recompute), nor norms, softmax and gates beyond their
  parameters, nor a reference model.

Invariant: computed from the full model on the meta device, the same on every rank and layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.decoder import Decoder
from models.lora_config import layer_of
from models.plan import EMBEDDING, rule_of
from models.spec import DecoderConfig, ModelSpec
from models.transformers_model import TransformersModel, complete_config

_FORWARD, _INPUT_GRADIENT, _OWN_GRADIENT = 2, 2, 2
_BELOW_LAYERS, _ABOVE_LAYERS = -1, 1 << 30
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class AttentionFlops:
    """Attention of one layer: operations of a query with one key, and the keys it attends to."""

    per_key: int
    window: int | None

    def per_token(self, length: int) -> int:
        """In rows of `length` tokens."""
        return self.per_key * (length if self.window is None else min(length, self.window))


@dataclass(frozen=True)
class TokenFlops:
    """Operations of the forward and the backward pass on one token."""

    products: float
    """Of all parameters, whatever the length of a row."""
    attention: tuple[AttentionFlops, ...]

    def per_token(self, length: int) -> float:
        """In rows of `length` tokens."""
        return self.products + sum(layer.per_token(length) for layer in self.attention)


@dataclass(frozen=True)
class _Used:
    """A parameter that multiplies hidden states: elements used for one token, where it is, and
    whether it is trained."""

    elements: float
    layer: int
    is_trained: bool


def training_flops(model: nn.Module, spec: ModelSpec) -> TokenFlops | None:
    """The operations of training the full `model` of `spec`, which may be on the meta device; None
    where its configuration does not have the sizes of attention."""
    heads = list(_attention(spec))
    if not heads:
        return None
    first = min(
        (_place(name) for name, p in model.named_parameters() if p.requires_grad),
        default=_ABOVE_LAYERS,
    )
    products = sum(used.elements * _passes(used, first) for used in _used(model, spec))
    return TokenFlops(
        products,
        tuple(
            AttentionFlops(_FORWARD * sizes * (3 if layer >= first else 1), window)
            for layer, (sizes, window) in enumerate(heads)
        ),
    )


def _passes(used: _Used, first: int) -> int:
    """Operations a token and element. `first`: the first layer with trained parameters."""
    has_backward = used.layer >= first
    return (
        _FORWARD
        + _INPUT_GRADIENT * int(has_backward)
        + _OWN_GRADIENT * int(used.is_trained)
    )  # fmt: skip


def _place(name: str) -> int:
    """The layer of a parameter, with embeddings below and the head above all of them."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    return _BELOW_LAYERS if "embed" in name or "wte" in name else _ABOVE_LAYERS


def _used(model: nn.Module, spec: ModelSpec) -> Iterator[_Used]:
    tables = {
        id(parameter)
        for module in model.modules() if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }  # fmt: skip
    head = _head(model)
    for name, parameter in model.named_parameters():
        is_head = parameter is head
        if (name == EMBEDDING or id(parameter) in tables) and not is_head:
            continue
        share = _share_of_experts(name, parameter, spec)
        place = _ABOVE_LAYERS if is_head else _place(name)
        yield _Used(parameter.numel() * share, place, parameter.requires_grad)


def _head(model: nn.Module) -> nn.Parameter | None:
    """The weight of the output head, which may be the table of the embedding."""
    if isinstance(model, Decoder):
        weights = dict(model.named_parameters())
        return weights.get("lm_head.weight", weights.get(EMBEDDING))
    head = model.wrapped.get_output_embeddings() if isinstance(model, TransformersModel) else None
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _share_of_experts(name: str, parameter: nn.Parameter, spec: ModelSpec) -> float:
    """The part of a parameter that one token uses."""
    if spec.decoder is not None:
        experts = spec.decoder.experts
        if experts is None or not rule_of(name, spec.decoder.parameters).expert:
            return 1.0
        return experts.experts_per_token / experts.num_experts
    if ".experts." not in name:
        return 1.0
    config = complete_config(spec)
    count = next((n for n in (getattr(config, key, None) for key in _EXPERTS) if n), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / count if chosen and count else 1.0


def _attention(spec: ModelSpec) -> Iterator[tuple[int, int | None]]:
    """For each layer: the sizes of a query and a value, of all heads; and its window."""
    if spec.decoder is not None:
        yield from ((_head_sizes(spec.decoder), window) for window in spec.decoder.sliding_window)
        return
    config: Any = complete_config(spec).get_text_config()
    sizes: list[Any] = [
        getattr(config, key, None)
        for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    ]
    if all(isinstance(value, int) and value > 0 for value in sizes):
        layers, heads, hidden = sizes
        size = getattr(config, "head_dim", None) or hidden // heads
        yield from ((2 * heads * size, None) for _ in range(layers))


def _head_sizes(config: DecoderConfig) -> int:
    latent = config.latent
    if latent is None:
        return 2 * config.num_attention_heads * config.head_dim
    query = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    return config.num_attention_heads * (query + latent.v_head_dim)
