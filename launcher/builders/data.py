"""Data of a job: the rows of a data section, their length, and the steps of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.builders.job import Job
from launcher.config.schema import DatasetSection
from launcher.data.build import build_dataset
from launcher.data.loader import Batch, evaluation_batches
from launcher.data.loaders import row_loader_of
from launcher.data.rows import RowDataset
from launcher.data.streaming.build import MachineRanks, build_stream
from launcher.errors import UserError
from launcher.parallel.filesystems import find_filesystem_groups, one_per_machine
from launcher.parallel.world import World
from models.positions import row_length


def open_dataset(job: Job, section: DatasetSection) -> RowDataset:
    """The rows of a data section; one rank of each file system prepares them in `dataset_cache`."""
    assert not isinstance(section.data_loader, list)  # mixtures are not built yet
    cache_dir, world = job.output_dir / "dataset_cache", job.world.with_long_timeout()
    filesystems = find_filesystem_groups(cache_dir, world, "the data cache could not be opened")
    settings: dict[str, Any] = {
        "tokenizer": None if row_loader_of(section.data_loader) else job.tokenizer,
        "seq_length": seq_length(job, section),
        "cache_dir": cache_dir,
        "once": lambda prepare: filesystems.on_own(world, "", prepare),
        "log": job.log,
        "model_config": job.spec.hf_config,
    }
    if section.data_loader.streaming:
        machine = _machine_ranks(cache_dir, world)
        seed = job.config.seed if section.seed is None else section.seed
        dataset = build_stream(section, seed=seed, machine=machine, **settings)
    else:
        dataset = build_dataset(section, **settings)
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


def _machine_ranks(cache_dir: Path, world: World) -> MachineRanks:
    """The ranks that share a producer: those of one machine, whose file system shows a file to all
    of them at once."""
    machines = one_per_machine(cache_dir, world)
    peers = machines.peers(world)
    return MachineRanks(
        once=lambda prepare: machines.on_own(world, "", prepare),
        number=peers.index(world.rank),
        count=len(peers),
    )


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


def evaluation_source(job: Job) -> Callable[[], Iterable[Batch]]:
    """A function whose every call returns this rank's share of the evaluation data."""
    assert job.config.eval_dataset is not None
    dataset = open_dataset(job, job.config.eval_dataset)
    return lambda: evaluation_batches(
        dataset,
        job.config.runner_config.batch_size,
        job.mesh.data_parallel,
        job.mesh.data_rank(job.world.rank),
        pin_memory=job.world.device.type == "cuda",
    )
