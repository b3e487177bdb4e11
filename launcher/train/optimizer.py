"""The optimizer: AdamW, its parameter groups, its state by parameter name, and clipping.

Owns what is kept for each parameter besides its value. In files the moments are `adam_m.<name>` and
`adam_v.<name>`, the names MindFormers users filter by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from launcher.config.schema import OptimizerSection
from launcher.parallel.local import local, local_gradients

MOMENTS = {"adam_m": "exp_avg", "adam_v": "exp_avg_sq"}
"""Prefix in files to the key in torch's optimizer state."""


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerSection,
    no_decay: Callable[[str, int], bool],
) -> torch.optim.AdamW:
    """AdamW over the trainable ones of `named`; `no_decay(name, ndim)` are not decayed.

    One group for each decay and device mesh: the kernel takes the tensors of a group together.
    """
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((no_decay(name, parameter.ndim), mesh), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.0 if exempt else config.weight_decay}
            for (exempt, _), parameters in sorted(groups.items(), key=lambda item: item[0][0])
        ],
        lr=0.0,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Both moments of every trainable parameter, by file name; zeros before the first step."""
    result: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = _counter(parameter, 0)
                for key in MOMENTS.values():
                    state[key] = torch.zeros_like(parameter, requires_grad=False)
            result |= {f"{prefix}.{name}": state[key] for prefix, key in MOMENTS.items()}
    return result


def equalise_moments(
    copies: Iterable[tuple[nn.Parameter, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> None:
    """Give each second parameter the state of the first."""
    for first, second in copies:
        state = optimizer.state[first]
        optimizer.state[second] = {key: value.clone() for key, value in state.items()}


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell the optimizer how many steps its moments have seen (bias correction)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"] = _counter(parameter, step)


def _counter(parameter: nn.Parameter, step: int) -> torch.Tensor:
    """The fused kernel wants its step counter in float32, beside the weights."""
    return torch.tensor(float(step), device=local(parameter).device)


def clip_gradients(parameters: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients in place so that their global norm is at most `max_norm`."""
    gradients = local_gradients(parameters)
    if not gradients:
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # on the host, with its state
