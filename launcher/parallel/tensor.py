"""Tensor and sequence parallelism, put beside a decoder.

Owns what the ranks of the `tp` axis say to each other. A *region* (attention, MLP, head) is entered
once and left once; in between each rank computes with its own heads or columns:

                     enter                       leave
    plain            nothing / add up            add up / nothing            (forward / backward)
    sequence cut     gather / add up and cut     add up and cut / gather

With `sequence` the states between regions are cut along the sequence, so that norms, residuals and
dropout hold 1 / tp of the tokens. Parameters are cut already, into plain tensors. Those that are
whole on every rank but see only part of the gradient are named by `models.plan.is_partial` and
added up once a step (`launcher.parallel.gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.layout.layout import ShardSpec
from launcher.parallel.collectives import all_reduce, copy_to_tp, gather, reduce_scatter, split
from launcher.parallel.vocabulary import look_up
from models.decoder import Decoder
from models.layers import Embedding
from models.plan import repeats_kv_heads
from models.spec import Rule

SEQUENCE = 1
"""The dim of states [rows, length, hidden] that is cut."""

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TensorParallel:
    """The ranks of one `tp` group, and how they share the work."""

    group: dist.ProcessGroup
    sequence: bool

    @property
    def rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)

    def enter(self, states: Tensor) -> Tensor:
        """States as they are between regions -> all tokens, into work that differs by rank."""
        if self.sequence:
            return gather(states, SEQUENCE, self.group)
        return copy_to_tp(states, self.group)

    def leave(self, states: Tensor) -> Tensor:
        """The ranks' parts of a result -> states as they are between regions."""
        if self.sequence:
            return reduce_scatter(states, SEQUENCE, self.group)
        return all_reduce(states, self.group)


def apply_tensor_parallel(
    model: Decoder, specs: Mapping[str, ShardSpec], tp: TensorParallel
) -> None:
    """Put tensor parallelism beside `model`, whose parameters are cut already."""
    for layer in model.model.layers.values():
        _share_attention(layer.self_attn, model, tp)
        _add_biases_once(layer, model.config.parameters, tp)
        for region in layer.regions():
            region.register_forward_pre_hook(partial(_enter, tp))
            region.register_forward_hook(partial(_leave, tp))
            if hasattr(region, "balance_share"):
                region.balance_share = 1.0 / tp.size
    if tp.sequence:
        model.stream_part = (tp.rank, tp.size)
    if model.embeds:
        _share_embedding(model, specs, tp)
    if model.ends:
        _share_head(model, specs, tp)


def _enter(tp: TensorParallel, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (tp.enter(inputs[0]), *inputs[1:])


def _leave(tp: TensorParallel, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return tp.leave(output)


def _share_attention(attention: nn.Module, model: Decoder, tp: TensorParallel) -> None:
    heads = model.config.num_attention_heads // tp.size
    attention.first_head = tp.rank * heads
    if not repeats_kv_heads(model.config, tp.size):
        return
    head = tp.rank * heads * model.config.num_key_value_heads // model.config.num_attention_heads
    rows = slice(head * model.config.head_dim, (head + 1) * model.config.head_dim)
    for projection in (attention.k_proj, attention.v_proj):
        for name, _ in projection.named_parameters(recurse=False):
            projection.views[name] = partial(_rows, rows)


def _rows(rows: slice, parameter: Tensor) -> Tensor:
    return parameter[rows]


def _add_biases_once(layer: nn.Module, rules: Mapping[str, Rule], tp: TensorParallel) -> None:
    """The biases of what leaves a region are whole on every rank: only the first adds them."""
    for name, _ in layer.named_parameters():
        if rules[name].added_once:
            module, _, leaf = name.rpartition(".")
            layer.get_submodule(module).views[leaf] = partial(_on_first, tp.rank == 0)


def _on_first(first: bool, parameter: Tensor) -> Tensor:
    return parameter * float(first)


def _share_embedding(model: Decoder, specs: Mapping[str, ShardSpec], tp: TensorParallel) -> None:
    embedding = model.model.embed_tokens
    if specs["model.embed_tokens.weight"].tp_dim is not None:
        embedding.forward = partial(_look_up_own, embedding, tp)  # type: ignore[method-assign]
        embedding.register_forward_hook(partial(_leave, tp))
        return
    # When tied, the head's part of the gradient differs by rank and is added up afterwards: the
    # embedding's part must count once in that sum. Every rank embeds its own tokens, or one all.
    tied = model.config.tie_word_embeddings
    if tied and tp.sequence:
        embedding.register_forward_pre_hook(partial(_own_tokens, tp))
    elif tied and tp.rank > 0:
        embedding.views["weight"] = _without_gradient
    elif tp.sequence:
        embedding.register_forward_hook(partial(_keep_own_tokens, tp))


def _look_up_own(embedding: Embedding, tp: TensorParallel, input_ids: Tensor) -> Tensor:
    return look_up(input_ids, embedding.held("weight"), tp.rank)


def _own_tokens(tp: TensorParallel, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].chunk(tp.size, dim=SEQUENCE)[tp.rank],)


def _without_gradient(parameter: Tensor) -> Tensor:
    return parameter.detach()


def _keep_own_tokens(tp: TensorParallel, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return split(output, SEQUENCE, tp.group)


def _share_head(model: Decoder, specs: Mapping[str, ShardSpec], tp: TensorParallel) -> None:
    head = model.head_module
    head.register_forward_pre_hook(partial(_enter, tp))
    if model.config.tie_word_embeddings:
        if specs["model.embed_tokens.weight"].tp_dim is not None:
            return
        count = model.config.vocab_size // tp.size
        head.views["weight"] = partial(_rows, slice(tp.rank * count, (tp.rank + 1) * count))


def gather_logits(model: Decoder, group: dist.ProcessGroup) -> None:
    """Let the head give the logits of the whole vocabulary, on every rank; for prediction."""
    model.head_module.register_forward_hook(partial(_gathered, group))


def _gathered(group: dist.ProcessGroup, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    """[..., vocabulary] from this rank's columns [..., n] and the others'."""
    pieces = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, logits.contiguous(), group=group)
    return torch.cat(pieces, dim=-1)
