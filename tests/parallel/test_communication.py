"""The collectives of a step: no more than the layout needs."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from tests.parallel.parity import Case
from tests.ranks import run_ranks
from tests.workshop import Workshop

SEQUENCE = {"use_seq_parallel": True}
INTERLEAVED = [Case(dp=2, micro=1), Case(dp=2, micro=4)]
SHARDS = [Case(dp=2, micro=1, sharded=True), Case(dp=2, micro=4, sharded=True)]
TENSOR = [Case(tp=2, micro=1), Case("qwen3 tied", tp=2, micro=2, parallel=SEQUENCE)]
CASES = [*INTERLEAVED, *SHARDS, *TENSOR]


def step_collectives(folder: str, cases: list[Case]) -> list[dict[str, int]]:
    """Collectives of the second step of each case, by name, and the bytes of the largest gather."""
    import torch
    import yaml
    from torch.utils._python_dispatch import TorchDispatchMode

    from launcher.builders.job import Job
    from launcher.builders.run import fresh_run
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.parallel import world as worlds
    from launcher.report.console import Console
    from launcher.train.step import train_step

    class Collectives(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if op.namespace == "c10d":
                self.counts[op._schema.name.removeprefix("c10d::").strip("_")] += 1
            return op(*args, **(kwargs or {}))

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    found = []
    for number, case in enumerate(cases):
        name = f"comm_{number}_{world.rank}.yaml"
        with open(name, "w") as file:
            yaml.safe_dump({**case.yaml(), "output_dir": "communication"}, file)
        resolved = resolve_command_line(parse(["--config", name, "--run_mode", "train"]))
        job = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
        run = fresh_run(job, None)
        train_step(run, run.loader.step(0), 1e-3)
        data = run.loader.step(8)
        with Collectives() as seen:
            train_step(run, data, 1e-3)
        run.loader.close()
        found.append(dict(seen.counts))
        torch.distributed.barrier()
    worlds.stop()
    return found


@pytest.fixture(scope="module")
def counts(materials: Workshop, tmp_path_factory) -> dict[str, Counter[str]]:
    workshop = materials.copy_to(tmp_path_factory.mktemp("communication"))
    (first, second) = run_ranks(2, step_collectives, str(workshop.folder), CASES)
    assert first == second, "the ranks must agree"
    return {str(case): Counter(seen) for case, seen in zip(CASES, first, strict=True)}


def test_accumulation_reduces_gradients_once(counts) -> None:
    once, four_times = (counts[str(case)] for case in INTERLEAVED)
    assert once == four_times
    once, four_times = (counts[str(case)] for case in SHARDS)
    assert once["reduce_scatter_base"] == four_times["reduce_scatter_base"] > 0
    assert once["allreduce"] == four_times["allreduce"]


def test_tensor_parallel_never_gathers_logits(counts) -> None:
    plain, sequence = (counts[str(case)] for case in TENSOR)
    layers = 4
    # Each layer has two regions: one all-reduce at the end of each, one in the backward pass at
    # its start. Further ones: the head's input, two for the loss, partial gradients, loss and norm.
    assert plain == {"allreduce": 4 * layers + 1 + 2 + 1 + 1}
    # Two micro-batches: an all-gather and a reduce-scatter at each region, forward and backward.
    ends = 2 * (2 * 2 * layers + 1)
    assert sequence == {"allgather_base": ends, "reduce_scatter_base": ends, "allreduce": 6}
