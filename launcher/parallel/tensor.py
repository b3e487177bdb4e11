"""Tensor and sequence parallelism, applied to a decoder.

Owns the communication on the `tp` axis. A *region* (attention, MLP, head) is entered once and left
once; in between each rank computes with its own heads or columns (forward / backward):

                         enter                         leave
    tensor parallel      none / all-reduce             all-reduce / none
    sequence parallel    all-gather / reduce-scatter   reduce-scatter / all-gather

With `sequence` the states between regions are split along the sequence, so that norms, residuals
and dropout hold 1 / tp of the tokens. Parameters are sharded before, into plain tensors. Those that
are replicated but get only a part of their gradient are given by `models.plan.is_partial`, and
all-reduced once a step (`launcher.parallel.gradients`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.layout.layout import ShardSpec
from launcher.parallel.collectives import all_reduce, copy_to_tp, gather, reduce_scatter, split
from launcher.parallel.lora import repeat_rows, shard_adapters
from launcher.parallel.vocabulary import look_up
from models.attention import BaseAttention
from models.decoder import Attention, Decoder
from models.layers import Embedding, Leaf
from models.moe import MoE
from models.plan import repeats_kv_heads
from models.spec import Rule

SEQUENCE = 1
"""The dim of states [rows, length, hidden] that sequence parallelism splits."""


@dataclass(frozen=True)
class TensorParallel:
    """The ranks of one `tp` group, and whether they split the sequence between regions."""

    group: dist.ProcessGroup
    sequence: bool

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)

    def enter(self, states: Tensor) -> Tensor:
        """States between regions -> states of all tokens, as the input of a region."""
        if self.sequence:
            return gather(states, SEQUENCE, self.group)
        return copy_to_tp(states, self.group)

    def leave(self, states: Tensor) -> Tensor:
        """Partial sums at the end of a region -> states between regions."""
        if self.sequence:
            return reduce_scatter(states, SEQUENCE, self.group)
        return all_reduce(states, self.group)


def apply_tensor_parallel(
    model: Decoder, specs: Mapping[str, ShardSpec], tp: TensorParallel
) -> None:
    """Apply tensor parallelism to `model`, whose parameters are sharded already."""
    shard_adapters(model, specs, tp.group)
    for layer in model.decoder_layers():
        _shard_attention(layer.self_attn, model, tp)
        _add_biases_once(layer, model.config.parameters, tp)
        for region in layer.regions():
            region.register_forward_pre_hook(partial(_enter, tp))
            region.register_forward_hook(partial(_leave, tp))
            if isinstance(region, MoE):
                region.balance_grad_scale = 1.0 / tp.size
    if tp.sequence:
        model.stream_part = (tp.rank, tp.size)
    if model.embeds:
        _shard_embedding(model, specs, tp)
    if model.ends:
        _shard_head(model, specs, tp)


def _enter(tp: TensorParallel, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (tp.enter(inputs[0]), *inputs[1:])


def _leave(tp: TensorParallel, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return tp.leave(output)


def _shard_attention(attention: BaseAttention, model: Decoder, tp: TensorParallel) -> None:
    heads = model.config.num_attention_heads // tp.size
    attention.first_head = tp.rank * heads
    if not repeats_kv_heads(model.config, tp.size):
        return
    assert isinstance(attention, Attention)  # latent attention has no KV heads to repeat
    head = tp.rank * heads * model.config.num_key_value_heads // model.config.num_attention_heads
    for projection, size in attention.key_value_projections():
        repeat_rows(projection, slice(head * size, (head + 1) * size))


def _rows(rows: slice, parameter: Tensor) -> Tensor:
    return parameter[rows]


def _add_biases_once(layer: nn.Module, rules: Mapping[str, Rule], tp: TensorParallel) -> None:
    """Biases added at the end of a region are replicated: only the first rank adds them."""
    for name, _ in layer.named_parameters():
        if rules[name].added_once:
            module, _, leaf = name.rpartition(".")
            owner = layer.get_submodule(module)
            assert isinstance(owner, Leaf)
            owner.views[leaf] = partial(_on_first, tp.rank == 0)


def _on_first(first: bool, parameter: Tensor) -> Tensor:
    return parameter * float(first)


def _shard_embedding(model: Decoder, specs: Mapping[str, ShardSpec], tp: TensorParallel) -> None:
    embedding = model.model.embed_tokens
    if specs["model.embed_tokens.weight"].tp_dim is not None:
        embedding.forward = partial(_local_embedding, embedding, tp)  # type: ignore[method-assign]
        embedding.register_forward_hook(partial(_leave, tp))
        return
    # When tied, the head's gradient differs by rank and is all-reduced afterwards: the embedding's
    # gradient must count once in that sum. Each rank embeds its own tokens, or the first rank all.
    tied = model.config.tie_word_embeddings
    if tied and tp.sequence:
        embedding.register_forward_pre_hook(partial(_local_ids, tp))
    elif tied and tp.rank > 0:
        embedding.views["weight"] = _without_gradient
    elif tp.sequence:
        embedding.register_forward_hook(partial(_split_states, tp))


def _local_embedding(embedding: Embedding, tp: TensorParallel, input_ids: Tensor) -> Tensor:
    return look_up(input_ids, embedding.held("weight"), tp.rank)


def _local_ids(tp: TensorParallel, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].chunk(tp.size, dim=SEQUENCE)[tp.rank],)


def _without_gradient(parameter: Tensor) -> Tensor:
    result: Tensor = _WithoutGradient.apply(parameter)
    return result


class _WithoutGradient(torch.autograd.Function):
    """The tensor itself, which gets no gradient. Unlike `detach`, what is computed from it takes
    part in the backward pass, whose collectives all ranks need to reach: where the layers are
    frozen, nothing else leads there."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def _split_states(tp: TensorParallel, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return split(output, SEQUENCE, tp.group)


def _shard_head(model: Decoder, specs: Mapping[str, ShardSpec], tp: TensorParallel) -> None:
    head = model.head_module
    model.enter_head = tp.enter
    if model.config.tie_word_embeddings:
        if specs["model.embed_tokens.weight"].tp_dim is not None:
            return
        count = model.config.vocab_size // tp.size
        head.views["weight"] = partial(_rows, slice(tp.rank * count, (tp.rank + 1) * count))


def gather_logits(model: Decoder, group: dist.ProcessGroup) -> None:
    """Make the head return the logits of the full vocabulary, on every rank; for prediction."""
    model.head_module.register_forward_hook(partial(_gathered, group))


def _gathered(group: dist.ProcessGroup, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    """[..., vocabulary] from this rank's columns [..., n] and the others'."""
    shards = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1)
