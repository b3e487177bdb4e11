"""Prediction: the generation settings, and generating from the prompts on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from launcher.builders.job import Job
from launcher.builders.model import predict_mesh
from launcher.config.checks.check import Check
from launcher.config.checks.generation import read_generation_file
from launcher.generation.forward import Forward
from launcher.generation.settings import GenerationSettings, generation_settings
from launcher.layout.mesh import Mesh
from launcher.parallel.consistency import check_same
from launcher.predict.generate import Generation, generate
from launcher.predict.results import RESULT_FILE

Share = list[tuple[int, Generation]]
PREDICT_BATCH = 8
"""Prompts in a batch when predict_batch_size is not set."""


def continue_prompts(
    job: Job, forward: Forward, prompts: Sequence[str], batch_size: int
) -> list[Generation]:
    """Every prompt with its continuation, on the main rank; each rank continues its share.

    Called by all ranks together. Raises `UserError`, also where machines differ in
    generation_config.json or in the tokenizer.
    """
    seed, mesh = job.config.generation_config.seed, predict_mesh(job)
    chosen = settings(job)
    ids = [job.tokenizer(prompt)["input_ids"] for prompt in prompts]
    check_same(
        job.world, {**asdict(chosen), "tokens of the prompts": ids},
        rule="all ranks need the same settings, which each machine reads from its own files",
        advice="Copy the same model folder and the same tokenizer to every machine",
    )  # fmt: skip
    forward.model.eval()
    return generate(
        forward,
        job.tokenizer,
        prompts,
        chosen,
        batch_size=batch_size,
        device=job.world.device,
        seed=job.config.seed if seed is None else seed,
        rank=mesh.data_rank(job.world.rank),
        data_parallel=mesh.data_parallel,
        gather=lambda done: _one_of_each_replica(job.world.gather(done), mesh),
    )


def _one_of_each_replica(shares: list[Share], mesh: Mesh) -> list[Share]:
    """What one rank of each replica has: all ranks of a replica have the same."""
    at = map(mesh.coordinates, range(mesh.world_size))
    return [share for share, a in zip(shares, at, strict=True) if a["tp"] == a["pp"] == 0]


def settings(job: Job) -> GenerationSettings:
    """The settings in YAML, else those in generation_config.json, else the defaults."""
    section = job.config.generation_config
    written: dict[str, Any] = {
        field.name: getattr(section, field.name)
        for field in fields(section)
        if job.provenance.is_written(f"generation_config.{field.name}")
    }
    check = Check(config=job.config, provenance=job.provenance, world_size=None)
    return generation_settings(
        written,
        job.spec.generation,
        read_generation_file(check).values,
        tokenizer=job.tokenizer,
        hf_config=job.spec.hf_config,
    )


def result_path(job: Job) -> Path:
    """The file of the result."""
    return Path(job.config.save_file or job.output_dir / RESULT_FILE)
