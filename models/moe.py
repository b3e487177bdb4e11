"""Mixture of experts: the router, the experts stacked into one tensor a projection, and the block.

Invariants: the router computes in float32; the token counts of experts stay on the device, without
synchronization (except for sizes that the grouped kernel cannot align); the result of a token does
not depend on the rest of the batch; backward passes are gathers, so they are deterministic.
`Experts` takes the sorted tokens of any number of experts; expert parallelism changes its input
from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.host_reads import host_read
from models.attention import StepContext
from models.layers import ACTIVATIONS, MLP, Leaf, Module
from models.products import infers, linear
from models.spec import ClampedGate, DecoderConfig, ExpertsConfig

if TYPE_CHECKING:
    from models.lora import LowRank


class Router(Leaf):
    """The top-k experts of a token, and their weights; weight [experts, hidden]."""

    def __init__(self, hidden: int, experts: ExpertsConfig) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts.num_experts, hidden))
        bias = nn.Parameter(torch.empty(experts.num_experts)) if experts.router_bias else None
        self.register_parameter("bias", bias)
        if experts.scoring == "sigmoid":
            correction = torch.zeros(experts.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", correction)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For `tokens` [n, hidden]: weights [n, k] float32, chosen experts [n, k] int64, and the
        probabilities of all experts [n, experts] float32."""
        experts = self.experts
        bias = self.held("bias")
        bias = None if bias is None else bias.float()
        logits = F.linear(tokens.float(), self.held("weight").float(), bias)
        if experts.scoring == "sigmoid":
            scores = logits.sigmoid()
            chosen = self._best(scores + self.e_score_correction_bias)
            probabilities = scores / scores.sum(-1, keepdim=True)
        else:
            scores = probabilities = torch.softmax(logits, dim=-1)
            chosen = torch.topk(scores, experts.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if experts.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * experts.routed_scaling_factor, chosen, probabilities

    def _best(self, scores: Tensor) -> Tensor:
        """Top-k experts within the top groups; the score of a group is the sum of its best two."""
        experts = self.experts
        grouped = scores.unflatten(-1, (experts.groups, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        kept = group_scores.topk(experts.groups_per_token, dim=-1).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
        scores = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        return scores.topk(experts.experts_per_token, dim=-1).indices


class Experts(Leaf):
    """Stacked gated MLPs: gate_proj and up_proj [experts, inner, hidden], down_proj [experts,
    hidden, inner] and, if configured, its bias [experts, hidden]."""

    def __init__(
        self, count: int, hidden: int, inner: int, activation: str, *, down_bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        bias = nn.Parameter(torch.empty(count, hidden)) if down_bias else None
        self.register_parameter("down_proj_bias", bias)
        self.activation = ACTIVATIONS[activation]
        self.adapters: dict[str, LowRank] = {}
        """The low-rank adapter of each projection that has one, whose matrices are stacks
        `gate_proj_lora_A` [experts, rank, hidden], `gate_proj_lora_B` [experts, inner, rank]."""

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Each token [n, hidden] through its expert: the first `counts[0]` through the first, and
        so on. `counts` [experts] int64 sums to n; zeros, and n = 0, are allowed."""
        gate = self._projected(tokens, "gate_proj", counts)
        up = self._projected(tokens, "up_proj", counts)
        return self.activated(gate, up, counts)

    def activated(self, gate: Tensor, up: Tensor, counts: Tensor) -> Tensor:
        """From both projections [n, inner] to the output; replaceable, as `MLP.activated`."""
        product = self._projected(self.activation(gate) * up, "down_proj", counts)
        bias = self.held("down_proj_bias")
        return product if bias is None else product + _of_expert(bias, counts, len(product))

    def _projected(self, tokens: Tensor, name: str, counts: Tensor) -> Tensor:
        product, adapter = grouped_linear(tokens, self.held(name), counts), self.adapters.get(name)
        if adapter is None or not adapter.enabled:
            return product
        low = grouped_linear(tokens, self.held(f"{name}_lora_A"), counts)
        return product + grouped_linear(low, self.held(f"{name}_lora_B"), counts) * adapter.scaling


class ClampedExperts(Experts):
    """The experts of gpt-oss, in the layout of its files: gate_up_proj [experts, hidden, 2 * inner]
    with gate and up interleaved, down_proj [experts, inner, hidden], and biases."""

    def __init__(self, count: int, hidden: int, inner: int, gate: ClampedGate) -> None:
        Leaf.__init__(self)
        self.adapters = {}
        self.gate_up_proj = nn.Parameter(torch.empty(count, hidden, 2 * inner))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(count, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(count, hidden))
        self.gate = gate

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """As `Experts.forward`."""
        gate_up = self._affine(tokens, "gate_up_proj", counts)
        return self.activated(gate_up[..., ::2], gate_up[..., 1::2], counts)

    def activated(self, gate: Tensor, up: Tensor, counts: Tensor) -> Tensor:
        """From both projections [n, inner] to the output; replaceable, as `MLP.activated`."""
        alpha, limit = self.gate.alpha, self.gate.limit
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return self._affine((up + 1) * (gate * torch.sigmoid(gate * alpha)), "down_proj", counts)

    def _affine(self, tokens: Tensor, name: str, counts: Tensor) -> Tensor:
        product = grouped_linear(tokens, self.held(name).transpose(-2, -1), counts)
        return product + _of_expert(self.held(f"{name}_bias"), counts, len(tokens))


class MoE(Module):
    """Router and experts instead of an MLP, with shared experts if configured."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        experts, hidden, activation = config.experts, config.hidden_size, config.hidden_act
        assert experts is not None
        self.router_name = experts.router_name
        """The attribute with the router, named as in files."""
        self.add_module(self.router_name, Router(hidden, experts))
        count, inner = experts.num_experts, experts.intermediate_size
        if experts.clamped is not None:
            self.experts: Experts = ClampedExperts(count, hidden, inner, experts.clamped)
        else:
            self.experts = Experts(count, hidden, inner, activation, down_bias=experts.down_bias)
        self.shared_experts: MLP | None = None
        if experts.shared_experts:
            self.shared_experts = MLP(hidden, inner * experts.shared_experts, activation)
        self.count = count
        self.balance_grad_scale = 1.0
        """Factor of the gradient of the balance loss, where several ranks compute the same loss and
        their gradients are summed."""
        self.row_sum: Callable[[Tensor], Tensor] = _identity
        """From sums over the local tokens [2, rows, experts] to sums over full rows;
        differentiable."""

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        """`states` [rows, length, hidden], and the result."""
        tokens = states.flatten(0, 1)
        weights, chosen, probabilities = getattr(self, self.router_name)(tokens)
        if self.training and context.balance_scale is not None:
            by_row = (t.unflatten(0, states.shape[:2]) for t in (probabilities, chosen))
            loss = row_balance(*by_row, total=context.mask.total, row_sum=self.row_sum).sum()
            scale = context.balance_scale * self.balance_grad_scale
            weights = _AttachLoss.apply(weights, loss, scale)
        routed = self._routed(tokens, weights, chosen).view_as(states)
        return (
            routed if self.shared_experts is None else routed + self.shared_experts(states, context)
        )

    def _routed(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The sum [n, hidden] of the outputs of each token's experts, weighted in float32."""
        flat = chosen.flatten()
        by_expert, order = flat.sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(flat), device=flat.device)
        experts = torch.arange(self.count, device=flat.device)
        ends = torch.searchsorted(by_expert, experts, right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        outputs = self.experts(_Gather.apply(tokens, order, inverse, chosen.shape[1]), counts)
        outputs = _Gather.apply(outputs, inverse, order, 1).unflatten(0, chosen.shape)
        return (outputs * weights[..., None]).sum(1).to(tokens.dtype)


def row_balance(
    probabilities: Tensor, chosen: Tensor, *, total: int, row_sum: Callable[[Tensor], Tensor]
) -> Tensor:
    """The load-balancing loss of each row [rows], float32.

    experts * sum over experts of (share of the row's tokens that chose it) * (its mean probability
    over the row's tokens), as in the Switch Transformer (https://arxiv.org/abs/2101.03961), but row
    by row: the loss of a row does not depend on its batch. `probabilities` [rows, length, experts],
    `chosen` [rows, length, k], `total` tokens in a full row.
    """
    hits = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
    sums = row_sum(torch.stack((hits.sum(1), probabilities.sum(1))))
    share, mean = (sums / total).unbind()
    return probabilities.shape[-1] * (share * mean).sum(-1)


def grouped_linear(tokens: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Grouped matrix product: `tokens` [n, inputs], sorted by group, times `weight` [groups,
    outputs, inputs]. Sizes that the kernel cannot align run in a loop, with a device sync."""
    if infers() and weight.device.type == "cpu":
        return _each_group(tokens, weight, counts)
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    traced = torch.compiler.is_compiling() and weight.dtype != torch.bfloat16
    if aligned and not traced:
        offsets = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(tokens, weight.transpose(-2, -1), offs=offsets)
    groups = zip(tokens.split(_on_host(counts)), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in groups])


def _each_group(tokens: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """As `grouped_linear`, group by group: in a decoding step few experts have a token, and the
    weights of the others are not read."""
    groups = zip(tokens.split(_on_host(counts)), weight.unbind(), strict=True)
    parts = [linear(rows, matrix) for rows, matrix in groups if len(rows)]
    return torch.cat(parts) if parts else tokens.new_empty(0, weight.shape[1])


def _on_host(counts: Tensor) -> list[int]:
    with host_read("group sizes"):
        sizes: list[int] = counts.tolist()
    return sizes


def _of_expert(biases: Tensor, counts: Tensor, length: int) -> Tensor:
    """The bias [length, size] of the expert of each token, from `biases` [experts, size]."""
    index = torch.arange(length, device=counts.device)
    expert = torch.searchsorted(counts.cumsum(0), index, right=True)
    return F.embedding(expert, biases)  # whose backward pass sums in a fixed order


class _Gather(torch.autograd.Function):
    """`states[order // repeats]`; backward gathers by `inverse`, the inverse of `order`, and sums
    the repeats of a row, where autograd would scatter in no fixed order."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, order: Tensor, inverse: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.repeats = repeats
        return states[order // repeats]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        shape = (len(inverse) // ctx.repeats, ctx.repeats)
        return gradient[inverse].unflatten(0, shape).sum(1), None, None, None


class _AttachLoss(torch.autograd.Function):
    """`states` unchanged; backward also passes `scale` to `loss`, as if scale * loss were added to
    the training loss."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient, scale.reshape(()), None


def _identity(sums: Tensor) -> Tensor:
    return sums
