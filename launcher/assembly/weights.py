"""Weights of a job: which ones, into a sharded model, and the lines that say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from launcher.assembly.job import DTYPES, Job
from launcher.checkpoint.resume import open_weights
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.parallel.apply import shard_model, shards
from launcher.train.run import model_tensors
from launcher.weights.load import LoadReport, load
from launcher.weights.source import Source, detect
from models.build import (
    blocks,
    build_model,
    initialise_shard,
    materialise,
    parameter_count,
    tied_names,
)


def find_weights(job: Job) -> Source | None:
    """The weights the user names: load_checkpoint, else pretrained_model_dir's, else None."""
    # A run that resumes takes load_checkpoint for the folder of checkpoints to go on from.
    trains = job.config.run_mode in ("train", "finetune")
    resumes = trains and job.config.resume_training is not False
    if job.config.load_checkpoint and not resumes:
        source = open_weights(Path(job.config.load_checkpoint), job.world, job.say)
    elif job.config.pretrained_model_dir and (
        detect(Path(job.config.pretrained_model_dir)) == "complete"
    ):
        source = open_weights(Path(job.config.pretrained_model_dir), job.world, job.say)
    else:
        return None
    check_assertions(job, source)
    return source


def check_assertions(job: Job, source: Source) -> None:
    """auto_trans_ckpt: False asserts that no weights need to be cut or put together."""
    if job.config.auto_trans_ckpt is not False or source.kind != "distributed":
        return
    if source.mesh != job.mesh.sizes():
        raise UserError(
            f"{source.path} was written by {source.world_size} ranks ({_axes(source.mesh or {})}), "
            f"this run has {job.world.size} ({_axes(job.mesh.sizes())})",
            where=job.provenance.where("auto_trans_ckpt"),
            rule="auto_trans_ckpt: False loads only the same layout",
            advice="Set auto_trans_ckpt: True",
        )


def _axes(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "no axis"


def build_sharded(job: Job, *, training: bool) -> nn.Module:
    """The model of the job in real memory, this rank's shards of it, values still undefined."""
    usual = torch.float32 if training else job.compute_dtype
    dtype = job.dtype(job.spec.precision.params_dtype, otherwise=usual)
    model = build_model(job.spec, dtype=dtype)
    if job.mesh.world_size > 1 or job.compute_dtype != dtype:
        shard_model(model, blocks(model), job.device_mesh, compute_dtype=job.compute_dtype)
    materialise(model, job.world.device)
    job.say(
        f"model: {job.spec.family}, {parameter_count(model):,} parameters "
        f"({_name(dtype)}, computing in {_name(job.compute_dtype)})"
    )
    return model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build_whole(job: Job) -> nn.Module:
    """The whole model on this rank, for prediction, values still undefined.

    In the configured compute dtype, else the dtype config.json names, else the usual one.
    """
    written = job.spec.hf_config.get("dtype") or job.spec.hf_config.get("torch_dtype")
    if job.spec.precision.compute_dtype is None and written in DTYPES:
        dtype = DTYPES[written]
    else:
        dtype = job.compute_dtype
    model = build_model(job.spec, dtype=dtype, device=job.world.device)
    job.say(f"model: {job.spec.family}, {parameter_count(model):,} parameters ({_name(dtype)})")
    return model


def fill_weights(
    job: Job, model: nn.Module, source: Source | None, mesh: Mesh | None = None
) -> None:
    """Load the weights of `source`, or begin at random; says which, in three lines at most.

    `mesh` is how the model is cut: the job's, unless told otherwise.
    """
    mesh = mesh or job.mesh
    rank = job.world.rank if mesh.world_size > 1 else 0
    if source is None:
        initialise(job, model, mesh, rank)
        job.say(f"weights: none given, initialised at random from seed {job.config.seed}")
        return
    if not job.config.strict_load:
        initialise(job, model, mesh, rank)
    targets = shards(model_tensors(model), mesh, rank)
    report = load(
        targets,
        source,
        tied=tied_names(model),
        strict=job.config.strict_load,
        rank=rank,
    )
    _tell(job, source, report)


def initialise(job: Job, model: nn.Module, mesh: Mesh, rank: int) -> None:
    """Random weights: a function of (seed, parameter name), the same on any layout."""
    held = shards(dict(model.named_parameters()), mesh, rank)
    with torch.no_grad():
        for name, shard in held.items():
            box = shard.box
            values = initialise_shard(
                name, shard.shape, box.offset, box.size, job.spec, job.config.seed
            )
            shard.tensor.copy_(values)


def _tell(job: Job, source: Source, report: LoadReport) -> None:
    bytes_read = sum(job.world.gather(report.bytes_read))
    job.say(
        f"loaded: {report.loaded} tensors, {bytes_read / 1e6:.1f} MB read from {source.path} "
        f"({source.kind})"
    )
    job.say(f"tied: {', '.join(report.tied) or 'nothing'}")
    asked = f"{len(report.not_loaded)} tensors ({', '.join(report.not_loaded[:4])})"
    job.say(f"initialised by request: {asked if report.not_loaded else 'nothing'}")
    if report.left_in_files:
        job.say(f"left in the files: {', '.join(report.left_in_files[:4])}")
