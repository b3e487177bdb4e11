"""The optimizer: AdamW, its parameter groups, its state by parameter name, and clipping.

Owns what is kept for each parameter besides its value. In files the moments are `adam_m.<name>` and
`adam_v.<name>`, the names MindFormers users filter by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from launcher.config.schema import OptimizerSection
from launcher.parallel.apply import local

MOMENTS = {"adam_m": "exp_avg", "adam_v": "exp_avg_sq"}
"""Prefix in files to the key in torch's optimizer state."""


def build_optimizer(
    model: nn.Module, config: OptimizerSection, no_decay: Callable[[str, int], bool]
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`; `no_decay(name, ndim)` are not decayed."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not no_decay(name, p.ndim)],
         "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if no_decay(name, p.ndim)], "weight_decay": 0.0},
    ]  # fmt: skip
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Both moments of every trainable parameter, by file name; zeros before the first step."""
    result: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = _counter(parameter, 0)
                for key in MOMENTS.values():
                    state[key] = torch.zeros_like(parameter, requires_grad=False)
            result |= {f"{prefix}.{name}": state[key] for prefix, key in MOMENTS.items()}
    return result


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell the optimizer how many steps its moments have seen (bias correction)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"] = _counter(parameter, step)


def _counter(parameter: nn.Parameter, step: int) -> torch.Tensor:
    """The fused kernel wants its step counter in float32, beside the weights."""
    return torch.tensor(float(step), device=local(parameter).device)


def gradient_norm(
    parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The global 2-norm of all gradients, a float32 scalar on the device, the same on every rank.

    `group`: the ranks that hold different shards of the same gradients; None when each holds all.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    held = [gradient for gradient in gradients if gradient.numel()]
    square = torch.zeros((), device=gradients[0].device)
    if held:
        norms = torch._foreach_norm(held, 2.0, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients in place so that their global norm is at most `max_norm`."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
