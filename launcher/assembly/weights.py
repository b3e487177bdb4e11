"""Weights of a job: which ones, into the memory of this rank's part, and the lines that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from launcher.assembly.job import Job
from launcher.checkpoint.resume import open_weights
from launcher.errors import UserError
from launcher.layout.layout import Layout
from launcher.parallel.apply import shards
from launcher.parallel.parts import Parts
from launcher.parallel.tied import equalise
from launcher.weights.links import linked, shapes_in_files
from launcher.weights.load import LoadReport, load
from launcher.weights.source import Source, detect
from models.build import initialise_shard, links_of, tied_names
from models.names import is_multi_token_prediction


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
    if _without_ones(source.mesh or {}) != _without_ones(job.mesh.sizes()):
        raise UserError(
            f"{source.path} was written by {source.world_size} ranks ({_axes(source.mesh or {})}), "
            f"this run has {job.world.size} ({_axes(job.mesh.sizes())})",
            where=job.provenance.where("auto_trans_ckpt"),
            rule="auto_trans_ckpt: False loads only the same layout",
            advice="Set auto_trans_ckpt: True",
        )


def _without_ones(sizes: Mapping[str, int]) -> dict[str, int]:
    """Axes of one rank say nothing; older files do not name them all."""
    return {axis: size for axis, size in sizes.items() if size > 1}


def _axes(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{a} {n}" for a, n in _without_ones(sizes).items()) or "no axis"


def fill_weights(job: Job, parts: Parts, layout: Layout, source: Source | None) -> None:
    """Load the weights of `source`, or begin at random; says which, in three lines at most.

    `layout` is how the model is cut: the job's, or that of one rank.
    """
    rank = job.world.rank if layout.mesh.world_size > 1 else 0
    if source is None:
        initialise(job, parts, layout, rank)
        job.say(f"weights: none given, initialised at random from seed {job.config.seed}")
    else:
        if not job.config.strict_load:
            initialise(job, parts, layout, rank)
        _load(job, parts, layout, source, rank)
    equalise_copies(parts)


def equalise_copies(parts: Parts) -> None:
    """Where a rank has both ends of a pipeline, its second copy of the tied embedding follows."""
    copies = parts.copies()
    equalise([first for first, _ in copies], [second for _, second in copies])


def _load(job: Job, parts: Parts, layout: Layout, source: Source, rank: int) -> None:
    links = links_of(parts.modules[-1])
    held = linked(shards(parts.named_tensors(), layout, rank), links)
    report = load(
        held,
        source,
        tied=tied_names(parts.modules[-1]),
        strict=job.config.strict_load,
        rank=rank,
        expected=shapes_in_files(layout.shapes, links),
        leave=lambda name: is_multi_token_prediction(name, job.spec),
    )
    _tell(job, source, report)


def initialise(job: Job, parts: Parts, layout: Layout, rank: int) -> None:
    """Random weights: a function of (seed, name in files), the same on any layout."""
    # The buffers of a transformers module have their values already.
    own = job.spec.decoder is not None
    tensors = parts.named_tensors() if own else dict(parts.named_parameters())
    held = linked(shards(tensors, layout, rank), links_of(parts.modules[-1]))
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
    job.say(f"initialised by request: {_listed(report.not_loaded)}")
    if report.left_in_files:
        job.say(f"left in the files: {_listed(report.left_in_files)}")


def _listed(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    if not names:
        return "nothing"
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{count} ({', '.join(names[:4])}{more})"
