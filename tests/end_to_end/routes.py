"""Runs that go from layout to layout: legs on real ranks, legs of one size in shared processes.

A leg trains on one layout until a step and leaves a checkpoint, from nothing or from a save of
another leg. Every rank hands over which samples it computed; the losses are in `metrics.jsonl`.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import yaml

from tests.ranks import PATIENCE, run_ranks
from tests.workshop import BASE, Workshop, merged

GLOBAL_BATCH = 8

Samples = dict[int, str]
"""Sample number to a digest of its tokens."""


@dataclass(frozen=True)
class Leg:
    """One start of a run."""

    output: str
    stop: int
    """The step it ends after, and saves."""
    dp: int = 1
    tp: int = 1
    pp: int = 1
    begins_with: tuple[str, int] | None = None
    """Output and step of the save it goes on from; None: a fresh run."""

    @property
    def ranks(self) -> int:
        """Processes it needs."""
        return self.dp * self.tp * self.pp

    def yaml(self, total_steps: int, saves: int) -> dict[str, Any]:
        """The configuration: a run of `total_steps`, saved every `saves` steps."""
        micro = 2 if self.pp > 1 else 1
        resumed: dict[str, Any] = {}
        if self.begins_with is not None:
            output, step = self.begins_with
            resumed = {"load_checkpoint": f"{output}/checkpoint",
                       "resume_training": f"CKP_rank_0-1_{step}"}  # fmt: skip
        return merged(BASE, {
            "output_dir": self.output,
            "train_dataset": {"seq_length": 16},
            "runner_config": {"batch_size": GLOBAL_BATCH // (self.dp * micro),
                              "max_steps": total_steps, "stop_step": self.stop},
            "lr_schedule": {"learning_rate": 5e-3},
            "parallel_config": {"data_parallel": self.dp, "model_parallel": self.tp,
                                "pipeline_stage": self.pp, "micro_batch_num": micro},
            "parallel": {"enable_parallel_optimizer": self.dp > 1},
            "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": saves,
                           "keep_checkpoint_max": 0}],
            **resumed,
        })  # fmt: skip


@dataclass(frozen=True)
class Walked:
    """What a leg did."""

    losses: dict[int, float]
    """Step to loss."""
    consumed: dict[int, int]
    """Step to the samples trained on after it."""
    samples: list[list[Samples]]
    """Of each step, what each rank computed."""


def walk(
    workshop: Workshop, legs: Sequence[Leg], total_steps: int, saves: int, timeout: float = PATIENCE
) -> dict[str, Walked]:
    """Every leg, in order, by output. Neighbours of one size share their processes."""
    found = {}
    for ranks, group in groupby(legs, key=lambda leg: leg.ranks):
        mine = list(group)
        configs = [leg.yaml(total_steps, saves) for leg in mine]
        computed = run_ranks(ranks, _train_all, str(workshop.folder), configs, timeout=timeout)
        for place, leg in enumerate(mine):
            rows = workshop.rows(leg.output)
            found[leg.output] = Walked(
                {row["step"]: row["loss"] for row in rows},
                {row["step"]: row["consumed_samples"] for row in rows},
                [list(step) for step in zip(*(rank[place] for rank in computed), strict=True)],
            )
    return found


def _train_all(folder: str, configs: Sequence[Mapping[str, Any]]) -> list[list[Samples]]:
    from launcher.parallel import world as worlds

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    computed = []
    for config in configs:
        computed.append(_train(config, world))
        gc.collect()
    worlds.stop()
    return computed


def _train(config: Mapping[str, Any], world: Any) -> list[Samples]:
    """`launcher.modes.train`, with an ear at the loader."""
    from launcher import modes
    from launcher.builders.job import Job
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.report.console import Console

    name = f"{config['output_dir']}_{world.rank}.yaml"
    with open(name, "w") as file:
        yaml.safe_dump(dict(config), file)
    resolved = resolve_command_line(parse(["--config", name, "--run_mode", "train"]))
    assert not resolved.problems, resolved.problems
    job = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
    chosen = modes.find_resume(job)
    assert (chosen is not None) == ("resume_training" in config)
    run = modes.resumed_run(job, chosen) if chosen else modes.fresh_run(job, None)
    computed: list[Samples] = []
    step = run.loader.step

    def heard(consumed_samples: int) -> Any:
        data = step(consumed_samples)
        computed.append({
            number: hashlib.sha256(row.numpy().tobytes()).hexdigest()
            for batch in data.batches
            for number, row in zip(batch.sample_ids.tolist(), batch.input_ids, strict=True)
        })  # fmt: skip
        return data

    run.loader.step = heard  # type: ignore[method-assign]
    modes.train_to_the_end(job, run, modes.build_callbacks(job))
    return computed
