"""Data of a job: what it trains on and evaluates, in which order, and the steps of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from launcher.builders.job import Job
from launcher.builders.mixture import open_mixture
from launcher.builders.open_dataset import open_dataset, seq_length
from launcher.config.derived import evaluation_datasets, global_batch_size, is_evaluation
from launcher.config.schema import DatasetSection, NamedDatasetSection
from launcher.data.joined import joined
from launcher.data.loader import evaluation_batches
from launcher.data.mixture import MixtureOrder
from launcher.data.order import GlobalOrder
from launcher.data.rows import RowDataset
from launcher.data.streaming.order import StreamOrder
from launcher.train.evaluate import EvaluationSet

EVALUATION_SEED = 0
"""Chooses the rows of `max_samples` in evaluation data: the same in every run, to be compared."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The rows that a run trains on, and their order."""

    dataset: RowDataset
    order: GlobalOrder | MixtureOrder | StreamOrder
    epoch_samples: int
    """Samples of one epoch."""


def open_training_data(job: Job, section: DatasetSection) -> TrainingData:
    """The data of `train_dataset`. Raises `UserError`."""
    seed = job.config.seed if section.seed is None else section.seed
    if isinstance(section.data_loader, list):
        open_source = partial(open_dataset, job, name="train_dataset")
        mixture = open_mixture(section, seed, job.log, open_source)
        order = mixture.order()
        for line in mixture.description(order):
            job.log(line)
        return TrainingData(
            dataset=joined(mixture.datasets, seq_length(job, section)),
            order=order,
            epoch_samples=order.epoch_samples,
        )
    dataset = open_dataset(job, section, "train_dataset")
    if dataset.is_endless:
        steps = job.config.runner_config.max_steps
        assert steps is not None  # a rule of the configuration
        return TrainingData(
            dataset=dataset,
            order=StreamOrder(seed, section.data_loader.is_shuffled),
            epoch_samples=steps * global_batch_size(job.config),  # the run is one epoch
        )
    plain = GlobalOrder(len(dataset), seed, section.data_loader.is_shuffled)
    return TrainingData(dataset=dataset, order=plain, epoch_samples=len(dataset))


def opened(job: Job, name: str, section: DatasetSection) -> TrainingData:
    """The data of `train_dataset`, or of evaluation data with the order of an evaluation."""
    if not is_evaluation(name):
        return open_training_data(job, section)
    rows = open_evaluation_rows(job, name, section)
    order = GlobalOrder(max(len(rows), 1), seed=0, shuffle=False)
    return TrainingData(dataset=rows, order=order, epoch_samples=len(rows))


def steps_per_epoch(rows: int, global_batch: int, *, drop_remainder: bool) -> int:
    """Optimizer steps of one epoch. A step may hold samples of two epochs; none is left out."""
    full, rest = divmod(rows, global_batch)
    return max(full + (rest > 0 and not drop_remainder), 1)


def open_evaluation_rows(job: Job, name: str, section: DatasetSection) -> RowDataset:
    """The rows of a section of evaluation data with the key `name`, those of a mixture source after
    source. Raises `UserError`."""
    if not isinstance(section.data_loader, list):
        return open_dataset(job, section, name)
    open_source = partial(open_dataset, job, name=name)
    mixture = open_mixture(section, EVALUATION_SEED, job.log, open_source)
    return joined(mixture.datasets, seq_length(job, section))


def evaluation_data(job: Job) -> list[EvaluationSet]:
    """The data of `eval_dataset`, or of each of `eval_datasets`, every row once. Raises
    `UserError`."""
    return [_set(job, *entry) for entry in evaluation_datasets(job.config).items()]


def _set(job: Job, key: str, section: DatasetSection) -> EvaluationSet:
    dataset = open_evaluation_rows(job, key, section)
    batches = partial(
        evaluation_batches,
        dataset,
        job.config.runner_config.batch_size,
        job.mesh.data_parallel,
        job.mesh.data_rank(job.world.rank),
        pin_memory=job.world.device.type == "cuda",
    )
    name = section.name if isinstance(section, NamedDatasetSection) else ""
    sources = tuple(source.name for source in dataset.sources)
    return EvaluationSet(name, batches, sources, dataset)
