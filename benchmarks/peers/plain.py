"""The job of `benchmarks/parallel.py` in plain torch, as an engineer would write it by hand.

One Llama, cut three ways over four ranks:

    dp    DistributedDataParallel, each rank its rows of the batch
    tp    Megatron's: matrices by columns, then by rows, one all-reduce behind each pair; embedding,
          head and cross entropy by vocabulary
    pp    torch.distributed.pipelining, 1F1B, equally many layers a stage

AdamW (fused), clipping to a global norm of one, float32. Nothing here comes from the launcher.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

Sizes = dict[str, Any]
"""`model_config` of the job: Llama's names."""


class _ToAll(torch.autograd.Function):
    """Into matrices that are cut by columns."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _FromAll(torch.autograd.Function):
    """Out of matrices that are cut by rows."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any) -> Tensor:
        states = states.contiguous()
        dist.all_reduce(states, group=group)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _VocabularyLoss(torch.autograd.Function):
    """Summed cross entropy of logits [tokens, part of the vocabulary]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        largest = logits.max(dim=-1).values
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        shifted = logits - largest[:, None]
        columns = logits.shape[1]
        labels = labels - dist.get_rank(group) * columns
        elsewhere = (labels < 0) | (labels >= columns)
        labels = labels.masked_fill(elsewhere, 0)
        hit = shifted.gather(1, labels[:, None])[:, 0].masked_fill(elsewhere, 0.0)
        powers = shifted.exp_()
        sums = powers.sum(dim=-1)
        dist.all_reduce(hit, group=group)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(powers.div_(sums[:, None]), labels, elsewhere)
        return (sums.log() - hit).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        shares, labels, elsewhere = ctx.saved_tensors
        shares[torch.arange(len(labels)), labels] -= (~elsewhere).to(shares.dtype)
        return shares.mul_(scale), None, None


class Attention(nn.Module):
    """Causal attention of `1 / parts` of the heads."""

    def __init__(self, sizes: Sizes, parts: int) -> None:
        super().__init__()
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        self.size = hidden // heads
        wide = hidden // parts
        shared = sizes["num_key_value_heads"] * self.size // parts
        self.q_proj = nn.Linear(hidden, wide, bias=False)
        self.k_proj = nn.Linear(hidden, shared, bias=False)
        self.v_proj = nn.Linear(hidden, shared, bias=False)
        self.o_proj = nn.Linear(wide, hidden, bias=False)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = states.shape
        query, key, value = (
            projection(states).view(rows, length, -1, self.size).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return attended


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; `cos` and `sin` [length, size]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), `1 / parts` of the columns."""

    def __init__(self, sizes: Sizes, parts: int) -> None:
        super().__init__()
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"] // parts
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))
        return out


class Layer(nn.Module):
    """Attention and MLP, each normed before and added to its input."""

    def __init__(self, sizes: Sizes, group: Any) -> None:
        super().__init__()
        parts = dist.get_world_size(group) if group else 1
        hidden, eps = sizes["hidden_size"], sizes["rms_norm_eps"]
        self.group = group
        self.self_attn = Attention(sizes, parts)
        self.mlp = MLP(sizes, parts)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self._enter(self.input_layernorm(states))
        states = states + self._leave(self.self_attn(normed, cos, sin))
        normed = self._enter(self.post_attention_layernorm(states))
        return states + self._leave(self.mlp(normed))

    def _enter(self, states: Tensor) -> Tensor:
        return states if self.group is None else _ToAll.apply(states, self.group)

    def _leave(self, states: Tensor) -> Tensor:
        return states if self.group is None else _FromAll.apply(states, self.group)


class Llama(nn.Module):
    """The model, or the stage `part` of `parts`; with a `group` this rank's slice of it."""

    def __init__(self, sizes: Sizes, *, part: int = 0, parts: int = 1, group: Any = None) -> None:
        super().__init__()
        self.group = group
        vocabulary, hidden = sizes["vocab_size"], sizes["hidden_size"]
        rows = vocabulary // (dist.get_world_size(group) if group else 1)
        each = sizes["num_hidden_layers"] // parts
        held = range(part * each, (part + 1) * each)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(rows, hidden) if part == 0 else None
        self.model.layers = nn.ModuleDict({str(layer): Layer(sizes, group) for layer in held})
        last = part == parts - 1
        self.model.norm = nn.RMSNorm(hidden, sizes["rms_norm_eps"]) if last else None
        self.lm_head = nn.Linear(hidden, rows, bias=False) if last else None
        cos, sin = tables(sizes)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        states = inputs if self.model.embed_tokens is None else self._embedded(inputs)
        length = states.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        for layer in self.model.layers.values():
            states = layer(states, cos, sin)
        if self.lm_head is None:
            return states
        states = self.model.norm(states)
        if self.group is not None:
            states = _ToAll.apply(states, self.group)
        logits: Tensor = self.lm_head(states)
        return logits

    def _embedded(self, ids: Tensor) -> Tensor:
        embedding = self.model.embed_tokens
        if self.group is None:
            return embedding(ids)
        own = ids - dist.get_rank(self.group) * embedding.num_embeddings
        elsewhere = (own < 0) | (own >= embedding.num_embeddings)
        found = embedding(own.masked_fill(elsewhere, 0))
        return _FromAll.apply(found.masked_fill(elsewhere[..., None], 0.0), self.group)


def tables(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, size] of the rotary positions."""
    size = sizes["hidden_size"] // sizes["num_attention_heads"]
    powers = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / sizes["rope_theta"] ** powers
    angles = torch.arange(sizes["max_position_embeddings"])[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def optimizer_of(model: nn.Module, job: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW that leaves norms undecayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=job["learning_rate"], betas=(0.9, 0.95), eps=job["eps"], weight_decay=0.1,
        fused=True,
    )  # fmt: skip


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


class Trained:
    """A model that learns: `step` on the tokens [rows, length + 1] of a global batch."""

    def __init__(self, model: nn.Module, job: dict[str, Any]) -> None:
        self.model, self.optimizer = model, optimizer_of(model, job)

    def step(self, tokens: Tensor) -> float:
        """One optimizer step. Returns the mean loss of the batch."""
        loss = self.backward(tokens)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def backward(self, tokens: Tensor) -> Tensor:
        """Gradients of the batch, clipped; the mean loss."""
        raise NotImplementedError


class DataParallel(Trained):
    """DistributedDataParallel."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(Llama(job["model"]), job)
        self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def backward(self, tokens: Tensor) -> Tensor:
        own = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        labels = own[:, 1:]
        loss = token_loss_sum(self.wrapped(own[:, :-1]), labels) / labels.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        total = loss.detach()
        dist.all_reduce(total)
        return total / dist.get_world_size()


class TensorParallel(Trained):
    """Megatron's way, all ranks in one group."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.group = dist.new_group()
        super().__init__(Llama(job["model"], group=self.group), job)

    def backward(self, tokens: Tensor) -> Tensor:
        labels = tokens[:, 1:].flatten()
        logits = self.model(tokens[:, :-1]).flatten(0, 1)
        loss: Tensor = _VocabularyLoss.apply(logits, labels, self.group) / len(labels)
        loss.backward()
        counted = [p.grad for p in self.model.parameters() if p.ndim > 1 or not dist.get_rank()]
        clip(self.model, counted)
        return loss.detach()


class Pipeline(Trained):
    """Stages of equally many layers, 1F1B."""

    def __init__(self, job: dict[str, Any]) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group()
        super().__init__(Llama(job["model"], part=rank, parts=ranks), job)
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        stage = PipelineStage(self.model, rank, ranks, torch.device("cpu"), group=self.group)
        self.targets = 1
        self.schedule = Schedule1F1B(
            stage, job["micro_batches"], scale_grads=False,
            loss_fn=lambda logits, labels: token_loss_sum(logits, labels) / self.targets,
        )  # fmt: skip

    def backward(self, tokens: Tensor) -> Tensor:
        labels = tokens[:, 1:].contiguous()
        self.targets = labels.numel()
        losses: list[Tensor] = []
        if self.is_first:
            self.schedule.step(tokens[:, :-1].contiguous(), return_outputs=False)
        elif self.is_last:
            self.schedule.step(target=labels, losses=losses, return_outputs=False)
        else:
            self.schedule.step(return_outputs=False)
        clip(self.model, [p.grad for p in self.model.parameters()])
        total = torch.stack(losses).sum() if losses else torch.zeros(())
        dist.all_reduce(total)
        return total


def clip(model: nn.Module, counted: list[Tensor | None]) -> None:
    """Clip to a global norm of one; `counted`: the gradients that this rank adds to the norm."""
    squared = nn.utils.get_total_norm([g for g in counted if g is not None]).square()
    dist.all_reduce(squared)
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, squared.sqrt())


AXES = {"dp": DataParallel, "tp": TensorParallel, "pp": Pipeline}


class Batches:
    """The global batches [rows, length + 1] of a file of token rows, round and round."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._rows = np.load(job["tokens"], mmap_mode="r")
        self._batch = job["global_batch"]

    def batch(self, step: int) -> Tensor:
        """The batch of step `step`, from 0."""
        first = step * self._batch
        chosen = np.arange(first, first + self._batch) % len(self._rows)
        return torch.from_numpy(self._rows[chosen].astype(np.int64))


def main(path: str) -> None:
    """Train alone, and write down the memory it took: [kB after the imports, kB at the peak]."""
    job = json.loads(Path(path).read_text())
    before = status("VmRSS")
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    trained, batches = AXES[job["axis"]](job), Batches(job)
    for step in range(job["steps"]):
        trained.step(batches.batch(step))
    result = Path(job["results"]) / f"plain_{dist.get_rank()}.json"
    result.write_text(json.dumps([before, status("VmHWM")]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def status(field: str) -> int:
    """A figure in kB of what Linux says about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(sys.argv[1])
