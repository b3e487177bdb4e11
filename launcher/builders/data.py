"""Data of a job: the rows of a data section, their length and order, and the steps of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from launcher.builders.job import Job
from launcher.builders.mixture import open_mixture
from launcher.config.schema import DatasetSection
from launcher.data.build import build_dataset
from launcher.data.joined import joined
from launcher.data.loader import evaluation_batches
from launcher.data.loaders import row_loader_of
from launcher.data.loaders.base import Log
from launcher.data.mixture import MixtureOrder
from launcher.data.order import GlobalOrder
from launcher.data.rows import RowDataset
from launcher.errors import UserError
from launcher.parallel.filesystems import find_filesystem_groups
from launcher.train.evaluate import EvaluationData
from models.positions import row_length

EVALUATION_SEED = 0
"""Chooses the rows of `max_samples` in `eval_dataset`: the same in every run, to be compared."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The rows that a run trains on, and their order."""

    dataset: RowDataset
    order: GlobalOrder | MixtureOrder
    epoch_samples: int
    """Samples of one epoch."""


def open_training_data(job: Job, section: DatasetSection) -> TrainingData:
    """The data of `train_dataset`. Raises `UserError`."""
    seed = job.config.seed if section.seed is None else section.seed
    if isinstance(section.data_loader, list):
        mixture = open_mixture(section, seed, job.log, partial(_open_source, job))
        order = mixture.order()
        for line in mixture.description(order):
            job.log(line)
        return TrainingData(
            dataset=joined(mixture.datasets, seq_length(job, section)),
            order=order,
            epoch_samples=order.epoch_samples,
        )
    dataset = _open_source(job, section, job.log)
    plain = GlobalOrder(len(dataset), seed, section.data_loader.shuffle)
    return TrainingData(dataset=dataset, order=plain, epoch_samples=len(dataset))


def open_dataset(job: Job, section: DatasetSection) -> RowDataset:
    """The rows of a data section that are read once, those of a mixture source after source. Raises
    `UserError`."""
    if not isinstance(section.data_loader, list):
        return _open_source(job, section, job.log)
    mixture = open_mixture(section, EVALUATION_SEED, job.log, partial(_open_source, job))
    return joined(mixture.datasets, seq_length(job, section))


def _open_source(job: Job, section: DatasetSection, log: Log) -> RowDataset:
    """The rows of a data section with one data loader; one rank of each file system prepares them
    in `dataset_cache`."""
    assert not isinstance(section.data_loader, list)
    cache_dir, world = job.output_dir / "dataset_cache", job.world.with_long_timeout()
    filesystems = find_filesystem_groups(cache_dir, world, "the data cache could not be opened")
    dataset = build_dataset(
        section,
        tokenizer=None if row_loader_of(section.data_loader) else job.tokenizer,
        seq_length=seq_length(job, section),
        cache_dir=cache_dir,
        once=lambda prepare: filesystems.on_own(world, "", prepare),
        log=log,
        model_config=job.spec.hf_config,
    )
    if filesystems.are_several:
        _check_same(world.gather(dataset.content))
    vocabulary = job.spec.hf_config.get("vocab_size")
    if vocabulary is not None and (dataset.largest_token or 0) >= vocabulary:
        raise UserError(
            f"the data has token {dataset.largest_token}",
            rule=f"the vocabulary of the model has {vocabulary} tokens",
            advice="Use the tokenizer of the model",
        )
    return replace(dataset, vocab_size=vocabulary)


def _check_same(contents: Sequence[str]) -> None:
    """All ranks have prepared the same tokens; `contents`: the hash of those of each rank."""
    other = next((rank for rank, found in enumerate(contents) if found != contents[0]), None)
    if other is not None:
        raise UserError(
            f"the data on the machine of rank {other} differs from that of rank 0",
            rule="all ranks train on the same rows, which each machine prepares from its own files",
            advice="Copy the same data files and the same tokenizer to every machine",
        )


def seq_length(job: Job, section: DatasetSection) -> int:
    """Tokens of a row: the data section's, else the model's, else what positions allow (2048)."""
    usual = row_length(job.spec.family, job.spec.hf_config)
    return section.seq_length or job.spec.seq_length or usual


def steps_per_epoch(rows: int, global_batch: int, *, drop_remainder: bool) -> int:
    """Optimizer steps of one epoch. A step may hold samples of two epochs; none is left out."""
    full, rest = divmod(rows, global_batch)
    return max(full + (rest > 0 and not drop_remainder), 1)


def evaluation_data(job: Job) -> EvaluationData:
    """The data of `eval_dataset`: every row once. Raises `UserError`."""
    assert job.config.eval_dataset is not None
    dataset = open_dataset(job, job.config.eval_dataset)
    batches = partial(
        evaluation_batches,
        dataset,
        job.config.runner_config.batch_size,
        job.mesh.data_parallel,
        job.mesh.data_rank(job.world.rank),
        pin_memory=job.world.device.type == "cuda",
    )
    return EvaluationData(batches, tuple(source.name for source in dataset.sources))
