"""Mixture of experts: the router, the experts stacked into one tensor a projection, and the block.

Invariants: the router computes in float32; the token counts of experts stay on the device, without
synchronization (except where no grouped kernel takes them, see `models.grouped`); the result of a
token does not depend on the rest of the batch; backward passes are gathers, so they are
deterministic. `Experts` takes the sorted tokens of any number of experts; expert parallelism
replaces `MoE.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import StepContext
from models.grouped import Groups, grouped_linear, of_group
from models.layers import ACTIVATIONS, MLP, Leaf, Module
from models.products import infers
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

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Each token [n, hidden], sorted by expert, through its expert: the first group through the
        first expert, and so on. Empty groups, and n = 0, are allowed.

        Gate and up are two products over the same sorted tokens. One product with both would need
        their weights side by side in memory, where files, optimizer and FSDP have two tensors:
        for 30B-A3B (128 experts, 2048 to 768) that is a copy of 0.8 GB a layer and pass, 0.35 ms on
        an H200. It would save one read of the tokens and, in the backward pass, one sum of their
        gradients: 0.3 ms for 8,192 tokens, less for fewer.
        """
        gate = self._projected(tokens, "gate_proj", groups)
        up = self._projected(tokens, "up_proj", groups)
        return self.activated(gate, up, groups)

    def activated(self, gate: Tensor, up: Tensor, groups: Groups) -> Tensor:
        """From both projections [n, inner] to the output; replaceable, as `MLP.activated`."""
        product = self._projected(self.activation(gate) * up, "down_proj", groups)
        bias = self.held("down_proj_bias")
        return product if bias is None else product + of_group(bias, groups, len(product))

    def _projected(self, tokens: Tensor, name: str, groups: Groups) -> Tensor:
        product, adapter = grouped_linear(tokens, self.held(name), groups), self.adapters.get(name)
        if adapter is None or not adapter.enabled:
            return product
        low = grouped_linear(tokens, self.held(f"{name}_lora_A"), groups)
        return product + grouped_linear(low, self.held(f"{name}_lora_B"), groups) * adapter.scaling


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

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """As `Experts.forward`."""
        gate_up = self._affine(tokens, "gate_up_proj", groups)
        return self.activated(gate_up[..., ::2], gate_up[..., 1::2], groups)

    def activated(self, gate: Tensor, up: Tensor, groups: Groups) -> Tensor:
        """From both projections [n, inner] to the output; replaceable, as `MLP.activated`."""
        alpha, limit = self.gate.alpha, self.gate.limit
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return self._affine((up + 1) * (gate * torch.sigmoid(gate * alpha)), "down_proj", groups)

    def _affine(self, tokens: Tensor, name: str, groups: Groups) -> Tensor:
        product = grouped_linear(tokens, self.held(name).transpose(-2, -1), groups)
        return product + of_group(self.held(f"{name}_bias"), groups, len(tokens))


class Exchange:
    """How tokens get to the ranks of their experts and back: here, where every rank has all
    experts, they stay. Expert parallelism has its own.

    `MoE` calls the four methods in this order. Between them it queues what does not depend on them
    (sorting the tokens, the shared experts), so that an exchange may be under way meanwhile.
    """

    def begin(self, counts: Tensor) -> Any:
        """`counts` [experts] int64 of the local tokens are known."""
        return Groups(counts)

    def send(self, tokens: Tensor, begun: Any) -> Any:
        """Send the tokens [n, hidden], sorted by expert. `begun`: the result of `begin`."""
        return tokens, begun

    def receive(self, sent: Any) -> tuple[Tensor, Groups]:
        """The arguments of `Experts.forward`. `sent`: the result of `send`."""
        return sent

    def give_back(self, outputs: Tensor, sent: Any) -> Tensor:
        """The outputs [n, hidden] of the tokens that were sent, in their order."""
        return outputs


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
        self.exchange = Exchange()

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        """`states` [rows, length, hidden], and the result."""
        tokens = states.flatten(0, 1)
        weights, chosen, probabilities = getattr(self, self.router_name)(tokens)
        if self.training and context.balance_scale is not None:
            by_row = (t.unflatten(0, states.shape[:2]) for t in (probabilities, chosen))
            loss = row_balance(*by_row, total=context.mask.total, row_sum=self.row_sum).sum()
            scale = context.balance_scale * self.balance_grad_scale
            weights = _AttachLoss.apply(weights, loss, scale)
        order, inverse, counts = self._sorted(chosen)
        begun = self.exchange.begin(counts)
        sent = self.exchange.send(_Gather.apply(tokens, order, inverse, chosen.shape[1]), begun)
        shared = None if self.shared_experts is None else self.shared_experts(states, context)
        outputs = self.exchange.give_back(self.experts(*self.exchange.receive(sent)), sent)
        routed = weighted_sum(outputs, weights, order, inverse).view_as(states)
        return routed if shared is None else routed + shared

    def exchanged(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """The outputs of the experts for `tokens` [n, hidden], sorted by expert; `counts` [experts]
        int64 sums to n."""
        sent = self.exchange.send(tokens, self.exchange.begin(counts))
        return self.exchange.give_back(self.experts(*self.exchange.receive(sent)), sent)

    def _sorted(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The permutation that sorts the flat choices [n * k] of the tokens by expert, its inverse,
        and how many chose each expert [experts]."""
        flat = chosen.flatten()
        by_expert, order = flat.sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(flat), device=flat.device)
        experts = torch.arange(self.count, device=flat.device)
        ends = torch.searchsorted(by_expert, experts, right=True)
        return order, inverse, ends.diff(prepend=ends.new_zeros(1))


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


def weighted_sum(outputs: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The weighted sum [n, hidden] of the outputs of each token's experts, in their dtype.

    `outputs` [n * k, hidden], sorted by expert; `weights` [n, k] float32; `order` sorted the flat
    choices, `inverse` is its inverse. Products are added in float32.
    """
    if infers() or outputs.dtype.itemsize > 2:
        by_token = _Gather.apply(outputs, inverse, order, 1).unflatten(0, weights.shape)
        return (by_token * weights[..., None]).sum(1).to(outputs.dtype)
    result: Tensor = _WeightedSum.apply(outputs, weights, order, inverse)
    return result


class _WeightedSum(torch.autograd.Function):
    """`weighted_sum` of outputs in 16 bits, expert after expert, so that no float32 tensor is
    larger than [n, hidden], forward or backward. In a compiled graph each pass is one kernel."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, weights: Tensor, order: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(outputs, weights, order, inverse)
        total = weights.new_zeros(len(weights), outputs.shape[1])
        for places, weight in zip(inverse.view_as(weights).T, weights.T, strict=True):
            total += outputs[places] * weight[:, None]
        return total.to(outputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outputs, weights, order, inverse = ctx.saved_tensors
        of_outputs = gradient[order // weights.shape[1]]
        of_outputs *= weights.flatten()[order][:, None]  # in float32, rounded once
        wide = gradient.to(weights.dtype)
        columns = inverse.view_as(weights).T
        of_weights = torch.stack([(wide * outputs[places]).sum(-1) for places in columns], 1)
        return of_outputs, of_weights, None, None


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
