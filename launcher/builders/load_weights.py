"""The weights of a job: which ones, loading this rank's part of them, and the lines of the log."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.builders.adapter import Weights, base_of, base_record, open_adapter
from launcher.builders.balanced_load import load_job
from launcher.builders.export_on_load import export_on_load
from launcher.builders.job import Job
from launcher.builders.model import predict_mesh
from launcher.checkpoint.resolve import open_complete_weights, open_weights
from launcher.environment import process_environment
from launcher.errors import UserError
from launcher.extensions import JOINED_MODULES
from launcher.layout.layout import Layout
from launcher.layout.mesh import other_layout
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import on_all_ranks
from launcher.parallel.apply import shards
from launcher.parallel.consistency import Unquoted, check_same
from launcher.parallel.lora import initialize_magnitudes
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.tied import broadcast_tied
from launcher.weights.adapters.copies import check_copies, without_copies
from launcher.weights.adapters.found import Base
from launcher.weights.adapters.peft_files import check_ties
from launcher.weights.content import content_of
from launcher.weights.foreign_names import KEYS, under_hugging_face_names
from launcher.weights.forms import may_be_foreign
from launcher.weights.joined import apart
from launcher.weights.reading.load import LoadReport
from launcher.weights.source import Source, holds_complete
from launcher.weights.tensor_mapping import mapped, shapes_in_files
from models.build import (
    fill_initial,
    ignorable,
    mappings_of,
    may_be_missing,
    named_as_model,
    tied_names,
)
from models.lora_config import is_adapter, is_saved

MOST_THREADS = 16
"""Threads that draw initial values: more would wait for memory."""


def find_weights(job: Job) -> Weights | None:
    """The weights of load_checkpoint, else those in pretrained_model_dir, else None. Where they are
    an adapter, or pet_config.load_adapter names one, also those of its base.

    Copies of them are written where save_unified_checkpoint or save_converted_checkpoint is set.
    Called by all ranks together. Raises `UserError`, also where the weights of a machine differ
    from those of rank 0.
    """
    path, found = _weights_path(job), job.adapter
    check_same_model(job)
    _check_same(job, {"weights": Unquoted("none" if path is None else "found")})
    if found is None:
        source = None if path is None else _open(job, path)
        if source is None or job.spec.lora is None:
            return None if source is None else Weights(source=_prepared(job, source))
        return Weights(source=_prepared(job, source), base=base_record(job, source))
    adapter = open_adapter(job, found)
    is_base = bool(job.config.pet_config.load_adapter)
    source, base = base_of(job, found.base, _base_places(job, path if is_base else None))
    return Weights(
        source=None if source is None else _prepared(job, source), adapter=adapter, base=base
    )


def resumed_base(job: Job, base: Base) -> Weights:
    """The base under the adapter of a checkpoint. Called by all ranks together; raises
    `UserError`."""
    source, known = base_of(job, base, _base_places(job, None))
    return Weights(source=None if source is None else _prepared(job, source), base=known)


def _base_places(job: Job, given: Path | None) -> list[Path]:
    """Where the base of an adapter may be: at the path `given`, else in pretrained_model_dir."""
    pretrained = Path(job.config.pretrained_model_dir)
    if given is None and job.config.pretrained_model_dir and holds_complete(pretrained):
        return [pretrained]
    return [] if given is None else [given]


def _open(job: Job, path: Path) -> Source:
    if path == Path(job.config.load_checkpoint):
        strategy = job.config.src_strategy_path_or_dir
        return open_weights(path, job.world, job.log, strategy=strategy)
    return open_complete_weights(path, job.world, job.log)


def _prepared(job: Job, source: Source) -> Source:
    """`source` checked, under the names of rank files, and copied where that is configured."""
    if source.kind != "distributed" and job.world.size > 1:
        _check_same_content(job, source)
    check_layout(job, source)
    source = under_model_names(job, source)
    if job.config.save_unified_checkpoint or job.config.save_converted_checkpoint:
        export_on_load(job, source)
    return source


def weights_at(job: Job, path: Path) -> Source:
    """Weights at a path that is not that of the job's own. Called by all ranks together."""
    source = open_weights(path, job.world, job.log, strategy="")
    if source.kind != "distributed" and job.world.size > 1:
        _check_same_content(job, source)
    return under_model_names(job, source)


def pretrained_weights(job: Job) -> Source | None:
    """The weights in pretrained_model_dir, if there are some. Called by all ranks together."""
    folder = Path(job.config.pretrained_model_dir)
    holds = bool(job.config.pretrained_model_dir) and holds_complete(folder)
    _check_same(job, {"weights": Unquoted("found" if holds else "none")})
    return weights_at(job, folder) if holds else None


def under_model_names(job: Job, source: Source) -> Source:
    """`source` under the names that rank files have: from those of Hugging Face, or of another
    program. Raises `UserError`."""
    if may_be_foreign(source.tensors):
        keys = {key: getattr(job.config, key) for key in KEYS}
        source = under_hugging_face_names(source, job.spec.hf_config, keys, job.log)
    is_joined = job.spec.family in JOINED_MODULES
    return apart(source, job.spec.hf_config) if is_joined else source


def check_same_model(job: Job) -> None:
    """Check that every machine describes the same model. Called by all ranks together; raises
    `UserError`."""
    config = job.spec.hf_config
    _check_same(job, {f"config.json: {key}": value for key, value in config.items()})


def _check_same_content(job: Job, source: Source) -> None:
    """Check that complete weights are the same on every machine. One rank of each reads a sample:
    ranks of one machine have the same files."""
    environment = process_environment()
    if not environment.has_several_machines:
        return
    reads = environment.local_rank == 0
    content = on_all_ranks(job.world, lambda: content_of(source) if reads else "")
    of_main = job.world.from_main(content)
    _check_same(job, {f"weights in {source.path.name}": Unquoted(content or of_main)})


def _check_same(job: Job, metadata: Mapping[str, Any]) -> None:
    check_same(
        job.world,
        metadata,
        rule="all ranks start from one model, which each machine reads from its own files",
        advice="Copy the same model folder to every machine",
    )


def _weights_path(job: Job) -> Path | None:
    config = job.config
    # A run that resumes takes load_checkpoint as the folder of checkpoints.
    trains = config.run_mode in ("train", "finetune")
    if config.load_checkpoint and not (trains and config.resume_training is not False):
        return Path(config.load_checkpoint)
    pretrained = Path(config.pretrained_model_dir)
    return pretrained if config.pretrained_model_dir and holds_complete(pretrained) else None


def check_layout(job: Job, source: Source) -> None:
    """Check that weights need no resharding where auto_trans_ckpt is False."""
    if job.config.auto_trans_ckpt is not False or source.kind != "distributed":
        return
    predicts = job.config.run_mode in ("predict", "predict_with_train_model")
    mesh = predict_mesh(job) if predicts else job.mesh
    difference = other_layout(source.world_size, source.mesh, mesh)
    if difference:
        raise _other_layout(job, f"{source.path} {difference}")


def check_cuts(job: Job, source: Source, held: Mapping[str, Shard]) -> None:
    """As `check_layout`, box by box: with auto_trans_ckpt: False every box that this rank holds was
    written by a rank. Equal axes may shard a model in two ways."""
    if job.config.auto_trans_ckpt is not False or source.kind != "distributed":
        return
    for name, shard in held.items():
        pieces = source.tensors.get(name)
        if pieces is not None and shard.box.numel and not pieces.are_of_one_rank(shard.box):
            raise _other_layout(
                job,
                f"no rank has written the part of `{name}` that rank {job.world.rank} holds: "
                f"{list(shard.box.size)} of {list(shard.shape)}, from {list(shard.box.offset)} on",
            )


def _other_layout(job: Job, what: str) -> UserError:
    return UserError(
        what,
        where=job.provenance.where("auto_trans_ckpt"),
        rule="auto_trans_ckpt: False loads only the same layout",
        advice="Set auto_trans_ckpt: True",
    )


def load_or_init(job: Job, parts: ModelParts, layout: Layout, weights: Weights | None) -> None:
    """Load `weights`, or initialize them at random, and log which.

    `layout` is how the model is sharded: the layout of the job, or that of one rank.
    """
    rank = job.world.rank if layout.mesh.world_size > 1 else 0
    source = None if weights is None else weights.source
    if source is None:
        seed = job.config.seed if weights is None else weights.base.seed
        initialize(job, parts, layout, rank, seed)
        given = "none given, " if weights is None else "the base of the adapter is "
        job.log(f"weights: {given}initialized at random from seed {seed}")
    else:
        if not job.config.strict_load:
            initialize(job, parts, layout, rank)
        is_new = weights is None or weights.adapter is None
        _load(job, parts, layout, source, rank, is_new=is_new)
    if weights is not None and weights.adapter is not None:
        _load_adapter(job, parts, layout, weights.adapter, source, rank)
    sync_tied_weights(parts)


def _load_adapter(
    job: Job, parts: ModelParts, layout: Layout, source: Source, base: Source | None, rank: int
) -> None:
    """Load an adapter, and the modules that are saved with it, over those of the base."""
    model = parts.modules[-1]
    mappings = mappings_of(model)
    tensors = {n: t for n, t in parts.named_tensors().items() if is_saved(n, job.spec.lora)}
    held = mapped(shards(tensors, layout, rank), mappings)
    saved = {n: shape for n, shape in layout.shapes.items() if is_saved(n, job.spec.lora)}
    expected = shapes_in_files(saved, mappings)
    check_layout(job, source)
    check_cuts(job, source, held)
    found, ties = job.adapter, tied_names(model)
    if found is not None and found.is_peft:
        check_ties(source.tensors, found.config, ties.items(), str(source.path))
        source = _without_copies(job, source, base, {*expected, *ties})
    tied = {alias: name for alias, name in ties.items() if name in expected}
    report = load_job(
        job, held, layout, mappings, source, tied=tied, strict=job.config.strict_load,
        expected=expected,
    )  # fmt: skip
    _report(job, source, report)


def _without_copies(
    job: Job, adapter: Source, base: Source | None, wanted: Collection[str]
) -> Source:
    """`adapter` without the weights of the base that were copied into its files."""
    copies = [n for n in adapter.tensors if n not in wanted and ".lora_" not in n]
    if not copies:
        return adapter
    on_all_ranks(
        job.world, lambda: check_copies(adapter, base, copies) if job.world.is_main else None
    )
    job.log(f"in the files, as in the base: {_listed(copies)}")
    return without_copies(adapter, copies)


def sync_tied_weights(parts: ModelParts) -> None:
    """Where a rank has both ends of a pipeline, copy the tied embedding to its second place."""
    copies = parts.replicas()
    broadcast_tied([first for first, _ in copies], [second for _, second in copies])


def _load(
    job: Job, parts: ModelParts, layout: Layout, source: Source, rank: int, *, is_new: bool
) -> None:
    """Load the weights of a model; `is_new`: those of an adapter are initialized, and stay so."""
    model = parts.modules[-1]
    mappings = mappings_of(model)
    held = mapped(shards(parts.named_tensors(), layout, rank), mappings)
    expected = shapes_in_files(layout.shapes, mappings)
    check_cuts(job, source, held)
    named = named_as_model(source, model, expected)
    missing = {n for n in expected if n not in named.tensors}
    new = {n for n in missing if is_adapter(n)}
    spared = new | {n for n in missing if may_be_missing(model, n)}
    is_ignorable = ignorable(model, job.spec, expected)
    report = load_job(
        job, {n: shard for n, shard in held.items() if n not in spared}, layout, mappings, named,
        tied=tied_names(model),
        strict=job.config.strict_load,
        expected={n: shape for n, shape in expected.items() if n not in spared},
        leave=lambda name: is_ignorable(name, named.shape(name), named.dtype(name)),
    )  # fmt: skip
    _report(job, source, report)
    if new:
        _initialize(job, {n: s for n, s in held.items() if n in new}, job.config.seed)
        for module in parts.modules:
            initialize_magnitudes(module, layout.shapes)
    if new and is_new:
        job.log(f"adapter: {len(new)} tensors, initialized from seed {job.config.seed}")


def initialize(
    job: Job, parts: ModelParts, layout: Layout, rank: int, seed: int | None = None
) -> None:
    """Random weights: a function of (seed, name in files), the same on any layout. `seed`: by
    default that of the configuration."""
    # The buffers of a transformers module already have their values.
    own = job.spec.decoder is not None
    tensors = parts.named_tensors() if own else dict(parts.named_parameters())
    held = mapped(shards(tensors, layout, rank), mappings_of(parts.modules[-1]))
    _initialize(job, held, job.config.seed if seed is None else seed)
    for module in parts.modules:
        initialize_magnitudes(module, layout.shapes)


def _initialize(job: Job, held: Mapping[str, Shard], seed: int) -> None:
    """Random values of tensors in files, drawn on this rank's share of the cores."""
    ranks = process_environment().local_world_size
    threads = len(os.sched_getaffinity(0)) // ranks if hasattr(os, "sched_getaffinity") else 1
    fill_initial(held, job.spec, seed, threads=min(max(threads, 1), MOST_THREADS))


def _report(job: Job, source: Source, report: LoadReport) -> None:
    bytes_read = sum(job.world.gather(report.bytes_read))
    job.log(
        f"loaded: {report.loaded} tensors, {bytes_read / 1e6:.1f} MB read from {source.path} "
        f"({source.kind})"
    )
    job.log(f"tied: {', '.join(report.tied) or 'nothing'}")
    if report.not_loaded:
        job.log(f"initialized, not in the files: {_listed(report.not_loaded)}")
    if report.left_in_files:
        job.log(f"in the files, not loaded: {_listed(report.left_in_files)}")
    if source.promised:
        job.log(f"in the index but in no file, not needed: {_listed([*source.promised])}")


def _listed(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{count} ({', '.join(names[:4])}{more})"
