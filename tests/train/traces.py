"""The measurements of a run, step by step, on real ranks: for tests of skipped steps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from launcher.train.state import TrainState
from tests.parallel.parity import Case
from tests.ranks import run_ranks
from tests.workshop import Workshop


@dataclass(frozen=True)
class Plan:
    """A run of `steps` steps, in some of which one gradient is infinite, on one rank alone."""

    case: Case
    steps: int = 6
    poisoned: tuple[int, ...] = ()
    looks: bool = False
    """Whether all that the optimizer has is looked at around every step."""


@dataclass
class Trace:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scales: list[float | None] = field(default_factory=list)
    overflows: list[bool | None] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    changed: list[set[str]] = field(default_factory=list)
    """Kinds of tensors a step changed."""
    parameters: dict[str, np.ndarray] = field(default_factory=dict)
    state: TrainState | None = None


def traces(workshop: Workshop, *plans: Plan) -> list[list[Trace]]:
    """The traces of every plan, rank by rank."""
    found: dict[int, list[Trace]] = {}
    for ranks in {plan.case.ranks for plan in plans}:
        mine = [index for index, plan in enumerate(plans) if plan.case.ranks == ranks]
        chosen = [plans[index] for index in mine]
        results = run_ranks(ranks, _ranks_main, str(workshop.folder), chosen)
        found |= {index: [r[place] for r in results] for place, index in enumerate(mine)}
    return [found[index] for index in range(len(plans))]


def _ranks_main(folder: str, plans: Sequence[Plan]) -> list[Trace]:
    from launcher.parallel import world as worlds

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    found = [_trace(plan, world, f"{world.size}_{n}") for n, plan in enumerate(plans)]
    worlds.stop()
    return found


def _run(plan: Plan, world: Any, tag: str) -> Any:
    import yaml

    from launcher.builders.job import Job
    from launcher.builders.run import fresh_run
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.report.console import Console

    content = {**plan.case.yaml(), "output_dir": "scaling"}
    content["runner_config"]["max_steps"] = plan.steps
    name = f"plan_{tag}_{world.rank}.yaml"
    with open(name, "w") as file:
        yaml.safe_dump(content, file)
    resolved = resolve_command_line(parse(["--config", name, "--run_mode", "train"]))
    assert not resolved.problems, resolved.problems
    return fresh_run(Job(resolved.config, resolved.provenance, world, Console(enabled=False)), None)


def _trace(plan: Plan, world: Any, tag: str) -> Trace:
    from launcher.train.loop import train_steps

    run, trace = _run(plan, world, tag), Trace()
    counted = [p for p in run.gradients.owned if _local(p).numel()]
    owners = [rank for rank, owns in enumerate(world.gather(bool(counted))) if owns]
    if world.rank == owners[-1]:
        _poison(run, counted[-1], plan.poisoned)
    for _ in range(plan.steps):
        before = _held(run) if plan.looks else {}
        ((record,), _) = train_steps(run)
        trace.losses.append(record.loss)
        trace.norms.append(record.grad_norm)
        trace.scales.append(record.loss_scale)
        trace.overflows.append(record.overflow)
        trace.updates.append(run.state.updates)
        after = _held(run) if plan.looks else {}
        trace.changed.append(
            {key.split(" ")[0] for key in before if not torch.equal(before[key], after[key])}
        )
    trace.parameters = {name: s.tensor.numpy().copy() for name, s in run.weights().items()}
    trace.state = run.state
    run.loader.close()
    return trace


def _local(tensor: Any) -> torch.Tensor:
    from launcher.parallel.local import local

    return local(tensor)


def _poison(run: Any, parameter: Any, steps: Sequence[int]) -> None:
    """In these steps, one element of the gradient of `parameter` is infinite on this rank."""
    finish = run.gradients.finish

    def poisoned() -> None:
        finish()
        if run.state.global_step in steps:
            _local(parameter.grad).view(-1)[0] = math.inf

    object.__setattr__(run.gradients, "finish", poisoned)


def _held(run: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights, the moments and the optimizer's counters."""
    tensors = {f"weight {name}": shard.tensor for name, shard in run.weights().items()}
    tensors |= {f"moment {name}": shard.tensor for name, shard in run.optimizer_state().items()}
    (optimizer,) = run.optimizer.parts
    counters = [optimizer.state.get(p, {}).get("step", torch.zeros(())) for p in run.parameters]
    tensors |= {f"counter {n}": counter for n, counter in enumerate(counters)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
