"""Optimizers: how each type is built, the state it keeps for a parameter, and its names in files.

Owns what is trained, and what a save holds beside the weights: saving, resuming, redundancy and
strategy files ask `Optimizer.state_names`. To add an optimizer:

    launcher/config/schema/training.py     its type and its keys
    OPTIMIZERS, below                      how it is built, and its state
    launcher/weights/optimizer_state.py    the prefix of its state, if it is a new one
    tests/train/test_optimizer.py,
    tests/parallel/test_optimizers.py      a row each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.config.schema import OptimizerSection
from launcher.parallel.local import local, local_gradients
from launcher.parallel.matrices import MatrixExchange
from launcher.train import moments
from launcher.train.muon import Muon
from models.trained import TrainedParameter

Groups = list[dict[str, Any]]
"""Parameter groups as torch takes them, with the names of their parameters."""
MakeExchange = Callable[[Sequence[str]], MatrixExchange]
"""From names of matrices to the way in which ranks put them together."""

STATE_KEYS = {
    "adam_m.": "exp_avg", "adam_v.": "exp_avg_sq",
    "muon_m.": "momentum_buffer", "moments.": "momentum_buffer",
}  # fmt: skip
"""Prefix in files to the key in the state of torch's optimizer. `adam_m` and `adam_v` are the names
MindFormers users filter by, `moments` is that of MindSpore's Momentum."""
NORM_EPSILON = 1e-6
"""Added to a gradient norm before dividing by it, as in `torch.nn.utils.clip_grad_norm_`."""


class Algorithm(NamedTuple):
    """An update rule for some of the parameters."""

    build: Callable[
        [Groups, OptimizerSection, MakeExchange, moments.Compile | None], torch.optim.Optimizer
    ]
    state_names: Callable[[OptimizerSection], tuple[str, ...]]
    """Prefixes of the tensors it keeps for each parameter, all of the parameter's shape."""


def _adam(
    kind: type[torch.optim.Adam], groups: Groups, betas: Sequence[float], eps: float,
    config: OptimizerSection, compiled: moments.Compile | None,
) -> torch.optim.Optimizer:  # fmt: skip
    both = (betas[0], betas[1])
    if (dtype := state_dtype(config, groups)) is None:
        return kind(groups, lr=0.0, betas=both, eps=eps, fused=True)
    decoupled = kind is torch.optim.AdamW
    return moments.Adam(groups, dtype, betas=both, eps=eps, decoupled=decoupled, compiled=compiled)


def _sgd(
    groups: Groups, config: OptimizerSection, _: MakeExchange, __: moments.Compile | None
) -> torch.optim.Optimizer:
    dtype = state_dtype(config, groups)
    if dtype is not None and config.momentum:
        return moments.SGD(
            groups, dtype, momentum=config.momentum, dampening=config.dampening,
            nesterov=bool(config.nesterov),
        )  # fmt: skip
    # Not fused: that kernel cannot start the momentum of a parameter after the first step.
    return torch.optim.SGD(
        groups, lr=0.0, momentum=config.momentum or 0.0, dampening=config.dampening,
        nesterov=bool(config.nesterov), foreach=True,
    )  # fmt: skip


def _muon(
    groups: Groups, config: OptimizerSection, make: MakeExchange, _: moments.Compile | None
) -> torch.optim.Optimizer:
    return Muon(
        groups,
        make([name for group in groups for name, _ in group["params"]]),
        momentum=0.95 if config.momentum is None else config.momentum,
        nesterov=config.nesterov is not False,
        steps=config.ns_steps,
        coefficients=config.ns_coefficients,
        rms=config.matched_adamw_rms,
        state_dtype=state_dtype(config, groups),
    )


def _two_moments(config: OptimizerSection) -> tuple[str, ...]:
    return ("adam_m.", "adam_v.")


ADAMW = Algorithm(
    lambda groups, config, _, compiled: _adam(
        torch.optim.AdamW, groups, config.betas, config.eps, config, compiled
    ),
    _two_moments,
)
ADAM = Algorithm(  # weight decay is added to the gradient (L2)
    lambda groups, config, _, compiled: _adam(
        torch.optim.Adam, groups, config.betas, config.eps, config, compiled
    ),
    _two_moments,
)
SGD = Algorithm(_sgd, lambda config: ("moments.",) if config.momentum else ())
MUON = Algorithm(_muon, lambda config: ("muon_m.",))
ADAMW_BESIDE_MUON = Algorithm(
    lambda groups, config, _, compiled: _adam(
        torch.optim.AdamW, groups, config.adamw_betas, config.adamw_eps, config, compiled
    ),
    _two_moments,
)

OPTIMIZERS: dict[str, Callable[[TrainedParameter], Algorithm]] = {
    "AdamW": lambda parameter: ADAMW,
    "Adam": lambda parameter: ADAM,
    "SGD": lambda parameter: SGD,
    "Muon": lambda parameter: MUON if parameter.is_matrix else ADAMW_BESIDE_MUON,
}
"""`optimizer.type` to the algorithm of each parameter."""


def state_dtype(config: OptimizerSection, groups: Groups) -> torch.dtype | None:
    """The dtype of the moments, where it is not that of the weights: torch's own optimizers keep
    them in that."""
    if config.state_dtype is None:
        return None
    dtype: torch.dtype = getattr(torch, config.state_dtype)
    held = {parameter.dtype for group in groups for _, parameter in group["params"]}
    return None if held == {dtype} else dtype


def state_names(
    config: OptimizerSection, trained: Mapping[str, TrainedParameter]
) -> dict[str, tuple[str, ...]]:
    """Every trained tensor of the full model to the prefixes of its state in files."""
    algorithm_of = OPTIMIZERS[config.type]
    return {name: algorithm_of(p).state_names(config) for name, p in trained.items()}


class Optimizer:
    """The optimizer of a run, on one rank."""

    def __init__(
        self, parts: Sequence[torch.optim.Optimizer], state_names: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.parts = parts
        """One for each algorithm."""
        self.state_names = state_names
        """Every tensor that is trained, on this rank or another, to the prefixes of its state."""
        self._part_of = {parameter: part for part in parts for parameter in _parameters(part)}

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradients so that their global norm, which is `norm` (a float32 scalar), is at
        most `max_norm`: at once, or in the update that follows, where its kernel can do so."""
        divisor = ((norm + NORM_EPSILON) / max_norm).clamp(min=1.0)
        for part in self.parts:
            parameters = _parameters(part)
            if _scales_gradients(part):
                # To the host with its optimizer state: torch itself would not wait for that copy.
                part.grad_scale = divisor.to(local(parameters[0]).device)  # type: ignore[attr-defined]
            else:
                clip_gradients(parameters, norm, max_norm)

    def step(self, rate: float) -> None:
        """Update the parameters with the learning rate `rate`."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            if _scales_gradients(part):
                part.grad_scale = None  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        """Free the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def allocate_state(self, named: Mapping[str, nn.Parameter]) -> None:
        """Make room for the state that a checkpoint will fill."""
        for name, parameter in named.items():
            for prefix in self.state_names.get(name, ()):
                state, key = self._part_of[parameter].state[parameter], STATE_KEYS[prefix]
                if state.get(key) is None:
                    state[key] = self._zeros(parameter)

    def state(self, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
        """Prefix to the state of the parameters `named`; zeros where no step has made any."""
        result: dict[str, dict[str, Tensor]] = {}
        for name, parameter in named.items():
            for prefix in self.state_names.get(name, ()):
                found = self._part_of[parameter].state.get(parameter, {}).get(STATE_KEYS[prefix])
                tensor = self._zeros(parameter) if found is None else found
                result.setdefault(prefix, {})[name] = tensor
        return result

    def copy_state(self, copies: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Give each second parameter the state of the first."""
        for first, second in copies:
            if first not in self._part_of:
                continue  # not trained
            state = self._part_of[first].state[first]
            self._part_of[second].state[second] = {k: v.clone() for k, v in state.items()}

    def set_updates(self, updates: int) -> None:
        """How many updates the state has seen: for bias correction, and none to begin afresh."""
        for part in self.parts:
            if isinstance(part, moments.StoredMoments | Muon):
                part.updates = updates
            if updates == 0:
                part.state.clear()
            elif isinstance(part, torch.optim.Adam):
                for parameter in _parameters(part):
                    part.state[parameter]["step"] = _counter(parameter, updates)

    def state_itemsize(self, parameter_itemsize: int) -> int:
        """Bytes of an element of the state of parameters with elements of so many."""
        dtypes = {dtype for part in self.parts if (dtype := _dtype_of(part)) is not None}
        return max((dtype.itemsize for dtype in dtypes), default=parameter_itemsize)

    def _zeros(self, parameter: nn.Parameter) -> Tensor:
        dtype = _dtype_of(self._part_of[parameter]) or parameter.dtype
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    trained: Mapping[str, TrainedParameter],
    config: OptimizerSection,
    make_exchange: MakeExchange,
    compiled: moments.Compile | None = None,
) -> Optimizer:
    """The configured optimizer over those of `named` that are `trained`.

    `compiled` compiles the update of optimizers that have no fused kernel of torch; None: eager.
    One group for each weight decay and device mesh: kernels take the tensors of a group together.
    """
    groups: dict[Algorithm, dict[tuple[bool, Any], list[tuple[str, nn.Parameter]]]] = {}
    for name, parameter in named:
        if name in trained:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            mine = groups.setdefault(OPTIMIZERS[config.type](trained[name]), {})
            mine.setdefault((trained[name].decays, mesh), []).append((name, parameter))
    parts = [
        algorithm.build(_decayed_first(mine, config.weight_decay), config, make_exchange, compiled)
        for algorithm, mine in groups.items()
    ]
    return Optimizer(parts, state_names(config, trained))


def _decayed_first(
    groups: Mapping[tuple[bool, Any], list[tuple[str, nn.Parameter]]], weight_decay: float
) -> Groups:
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), parameters in sorted(groups.items(), key=lambda item: not item[0][0])
    ]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _dtype_of(part: torch.optim.Optimizer) -> torch.dtype | None:
    """The dtype of the state of an optimizer; None: that of its parameters."""
    return part.dtype if isinstance(part, moments.StoredMoments | Muon) else None


def _counter(parameter: nn.Parameter, step: int) -> Tensor:
    """The fused kernel wants its step counter in float32, beside the weights."""
    return torch.tensor(float(step), device=local(parameter).device)


def _scales_gradients(part: torch.optim.Optimizer) -> bool:
    """Whether the update divides the gradients by `part.grad_scale` as it reads them: the fused
    kernels do, which spares a pass over the gradients. They store the quotient."""
    return isinstance(part, torch.optim.Adam) and part.defaults.get("fused") is True


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients in place so that their global norm is at most `max_norm`."""
    gradients = local_gradients(parameters)
    if not gradients:
        return
    factor = (max_norm / (norm + NORM_EPSILON)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # on the host, with its state
