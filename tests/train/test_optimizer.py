"""Optimizers in one process: against torch's own, their state by name, and bitwise resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.config.schema import OPTIMIZER_ARGUMENTS, OptimizerSection
from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh
from launcher.parallel.gradients import squared_norm
from launcher.parallel.matrices import MatrixExchange, matrix_exchange
from launcher.train.optimizer import (
    OPTIMIZERS,
    STATE_KEYS,
    Optimizer,
    build_optimizer,
    clip_gradients,
    state_names,
)
from launcher.weights.optimizer_state import STATE_PREFIXES
from launcher.weights.tensor_mapping import no_mapping
from models.trained import TrainedParameter

STEPS, RATE = 4, 0.01
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"betas": [0.8, 0.9], "eps": 1e-6},
    "Adam": {"betas": [0.8, 0.9], "eps": 1e-6},
    "SGD": {},
    "SGD momentum": {"momentum": 0.9, "dampening": 0.3},
    "SGD nesterov": {"momentum": 0.9, "nesterov": True},
    "Muon": {"adamw_betas": [0.8, 0.9]},
    "Muon heavy": {"momentum": 0.8, "nesterov": False, "ns_steps": 3},
}
"""Keys of `optimizer`, by type and a word that is no part of it."""


def section(setting: str, **more: Any) -> OptimizerSection:
    return OptimizerSection(
        type=setting.split()[0], weight_decay=0.5, **{**SETTINGS[setting], **more}
    )


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two matrices, tall and wide, and what is beside them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def facts(module: nn.Module) -> dict[str, TrainedParameter]:
    return {
        name: TrainedParameter(decays=p.ndim > 1, is_matrix=p.ndim > 1)
        for name, p in module.named_parameters()
    }


def exchange_of(module: nn.Module) -> Any:
    layout = Layout({name: tuple(p.shape) for name, p in module.named_parameters()}, Mesh())

    def make(names: Any) -> MatrixExchange:
        return matrix_exchange(names, layout, no_mapping, 0, torch.device("cpu"))

    return make


def built(module: nn.Module, config: OptimizerSection) -> Optimizer:
    return build_optimizer(module.named_parameters(), facts(module), config, exchange_of(module))


def torch_optimizers(module: nn.Module, config: OptimizerSection) -> list[torch.optim.Optimizer]:
    """The same with `torch.optim` alone."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    betas = (config.betas[0], config.betas[1])
    if config.type == "Muon":
        coefficients = tuple(config.ns_coefficients)
        adamw_betas = (config.adamw_betas[0], config.adamw_betas[1])
        return [
            torch.optim.Muon(matrices, lr=RATE, weight_decay=0.5, momentum=config.momentum or 0.95,
                             nesterov=config.nesterov is not False, ns_coefficients=coefficients,
                             ns_steps=config.ns_steps, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=RATE, betas=adamw_betas, weight_decay=0.0),
        ]  # fmt: skip
    if config.type == "SGD":
        numbers = {"momentum": config.momentum or 0.0, "dampening": config.dampening}
        return [torch.optim.SGD(groups, lr=RATE, nesterov=bool(config.nesterov), **numbers)]
    kind = torch.optim.Adam if config.type == "Adam" else torch.optim.AdamW
    return [kind(groups, lr=RATE, betas=betas, eps=config.eps)]


def take_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter.dtype)


def train(module: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        take_gradients(module, step)
        optimizer.step(RATE)
        optimizer.zero_grad()


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_computes_what_torch_computes(setting: str) -> None:
    config, mine, theirs = section(setting), model(), model()
    train(mine, built(mine, config), range(STEPS))
    reference = torch_optimizers(theirs, config)
    for step in range(STEPS):
        take_gradients(theirs, step)
        for optimizer in reference:
            optimizer.step()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
        if setting.startswith("Muon") and a.ndim > 1:
            assert torch.equal(a, b), name


def state(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    found = optimizer.state(dict(module.named_parameters()))
    return {prefix + name: t for prefix, tensors in found.items() for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_it_continues_bitwise_from_its_state(setting: str, done: int, dtype) -> None:
    config, first, second = section(setting), model(dtype), model(dtype)
    one, two = built(first, config), built(second, config)
    train(first, one, range(done))
    second.load_state_dict(first.state_dict())
    two.allocate_state(dict(second.named_parameters()))
    saved = {name: tensor.clone() for name, tensor in state(first, one).items()}
    for name, tensor in state(second, two).items():
        tensor.copy_(saved[name])
    two.set_updates(done)
    train(first, one, range(done, STEPS))
    train(second, two, range(done, STEPS))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, state(second, two)[n]) for n, t in state(first, one).items())


def names(*prefixes: str, of: str = "0.weight 0.bias 1.weight 1.bias 2.weight 2.bias") -> set[str]:
    return {prefix + name for prefix in prefixes for name in of.split()}


STATES: Mapping[str, set[str]] = {
    "AdamW": names("adam_m.", "adam_v."),
    "Adam": names("adam_m.", "adam_v."),
    "SGD": set(),
    "SGD momentum": names("moments."),
    "Muon": names("muon_m.", of="0.weight 2.weight")
    | names("adam_m.", "adam_v.", of="0.bias 1.weight 1.bias 2.bias"),
}


@pytest.mark.parametrize("setting", STATES)
def test_state_has_the_names_users_filter_by(setting: str) -> None:
    module, config = model(), section(setting)
    optimizer = built(module, config)
    assert state(module, optimizer).keys() == STATES[setting], "before the first step"
    train(module, optimizer, range(1))
    assert state(module, optimizer).keys() == STATES[setting]
    planned = state_names(config, facts(module))
    assert {p + name for name, prefixes in planned.items() for p in prefixes} == STATES[setting]


def test_every_optimizer_of_the_schema_is_built_and_its_state_is_known_to_files() -> None:
    assert OPTIMIZERS.keys() == OPTIMIZER_ARGUMENTS.keys()
    assert STATE_KEYS.keys() == set(STATE_PREFIXES)


def test_what_is_not_trained_stays_as_it_is() -> None:
    module = model()
    trained = {name: fact for name, fact in facts(module).items() if name != "0.weight"}
    before = module.get_parameter("0.weight").clone()
    optimizer = build_optimizer(module.named_parameters(), trained, section("AdamW"),
                                exchange_of(module))  # fmt: skip
    train(module, optimizer, range(2))
    assert torch.equal(module.get_parameter("0.weight"), before)
    assert "adam_m.0.weight" not in state(module, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("max_norm", [0.25, 1e6])
def test_clipping_in_the_update_is_clipping_before_it(
    setting: str, dtype: torch.dtype, max_norm: float
) -> None:
    config, mine, theirs = section(setting), model(dtype), model(dtype)
    one, two = built(mine, config), built(theirs, config)
    for step in range(STEPS):
        take_gradients(mine, step)
        take_gradients(theirs, step)
        norm = squared_norm(mine.parameters(), torch.device("cpu")).sqrt()
        one.clip(norm, max_norm)
        clip_gradients(theirs.parameters(), norm, max_norm)
        one.step(RATE)
        two.step(RATE)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        if max_norm > 1:
            assert torch.equal(a, b)
        assert torch.allclose(a, b, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("setting", "passes"), [("AdamW", 0), ("Adam", 0), ("SGD momentum", 1), ("Muon", 1)]
)
def test_a_fused_update_spares_the_pass_over_the_gradients(
    setting: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = model()
    optimizer, seen = built(module, section(setting)), []
    monkeypatch.setattr(
        "launcher.train.optimizer.clip_gradients",
        lambda parameters, *numbers: seen.append(len(list(parameters))),
    )
    take_gradients(module, 0)
    optimizer.clip(torch.tensor(10.0), 1.0)
    assert len(seen) == passes
    optimizer.step(RATE)
    assert all(getattr(part, "grad_scale", None) is None for part in optimizer.parts), "held once"
