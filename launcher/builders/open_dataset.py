"""Opening the rows of one data loader: prepared once for each file system, while other ranks wait.

Owns what is shown meanwhile, and the check that all machines have prepared the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.builders.job import Job
from launcher.config.derived import is_evaluation
from launcher.config.schema import Config, DatasetSection
from launcher.data.build import build_dataset
from launcher.data.loaders import row_loader_of
from launcher.data.loaders.base import Log
from launcher.data.progress import FIRST_SECONDS, Progress
from launcher.data.rows import RowDataset
from launcher.data.streaming.build import MachineRanks, build_stream
from launcher.environment import has_own_log
from launcher.errors import UserError
from launcher.parallel.filesystems import (
    FilesystemGroups,
    find_filesystem_groups,
    one_per_machine,
)
from launcher.parallel.long_work import LongWork
from launcher.report.console import Console, logger
from launcher.report.progress import bar
from models.positions import row_length

MAX_WORKERS = 16
"""Processes that tokenize unless the configuration sets their number; each takes 100s of MB."""
PLAIN_SECONDS = 5.0
"""Between lines of progress where the console is no terminal."""
LOG_SECONDS = 15.0
"""Between lines of progress in the log file."""


def open_dataset(
    job: Job, section: DatasetSection, name: str, log: Log | None = None
) -> RowDataset:
    """The rows of a data section with one data loader; one rank of each file system prepares them
    in the cache, while the others wait and show its progress.

    `name`: what the section is called, `train_dataset`. `log`: for lines about it; None: that of
    the job. Raises `UserError`.
    """
    assert not isinstance(section.data_loader, list)
    cache_dir, world = cache_folder(job.config), job.world.with_long_timeout()
    filesystems = find_filesystem_groups(cache_dir, world, "the data cache could not be opened")
    shown = _Shown(job, name, log)
    work = LongWork(world, filesystems, what=f"prepare {name}", on_wait=shown.waiting)

    def on_progress(progress: Progress) -> None:
        work.report(f"{progress.verb} {name}: {progress.detail}")
        shown.working(progress)

    if section.data_loader.streaming:
        return _open_stream(job, section, name, filesystems, work, shown.log)
    dataset = build_dataset(
        section,
        tokenizer=None if row_loader_of(section.data_loader) else job.tokenizer,
        seq_length=seq_length(job, section),
        cache_dir=cache_dir,
        once=work.on_own,
        log=shown.log,
        on_progress=on_progress,
        workers=_workers(section),
        max_cache_bytes=_max_bytes(job.config),
        model_config=job.spec.hf_config,
        chat=job.chat,
        phase="valid" if is_evaluation(name) else "train",
    )
    shown.end()
    if filesystems.are_several:
        _check_same(world.gather(dataset.content))
    return _with_vocabulary(job, dataset)


def _open_stream(
    job: Job,
    section: DatasetSection,
    name: str,
    filesystems: FilesystemGroups,
    work: LongWork,
    log: Log,
) -> RowDataset:
    """The rows of a section with streaming, which are made while they are read."""
    cache_dir, world = cache_folder(job.config), job.world.with_long_timeout()
    machines = one_per_machine(cache_dir, world)
    peers = machines.peers(world)
    dataset = build_stream(
        section,
        tokenizer=job.tokenizer,
        seq_length=seq_length(job, section),
        cache_dir=cache_dir,
        seed=job.config.seed if section.seed is None else section.seed,
        once=work.on_own,
        machine=MachineRanks(
            once=lambda prepare: machines.on_own(world, "", prepare),
            number=peers.index(world.rank),
            count=len(peers),
        ),
        log=log,
        on_progress=lambda line: work.report(f"{line} ({name})"),
        model_config=job.spec.hf_config,
        chat=job.chat,
    )
    if filesystems.are_several:
        _check_same(world.gather(dataset.content))
    return _with_vocabulary(job, dataset)


def _with_vocabulary(job: Job, dataset: RowDataset) -> RowDataset:
    """The dataset, whose tokens must be those of the model. Raises `UserError`."""
    vocabulary = job.spec.hf_config.get("vocab_size")
    if vocabulary is not None and (dataset.largest_token or 0) >= vocabulary:
        raise UserError(
            f"the data has token {dataset.largest_token}",
            rule=f"the vocabulary of the model has {vocabulary} tokens",
            advice="Use the tokenizer of the model",
        )
    return replace(dataset, vocab_size=vocabulary)


def seq_length(job: Job, section: DatasetSection) -> int:
    """Tokens of a row: the data section's, else the model's, else what positions allow (2048)."""
    usual = row_length(job.spec.family, job.spec.hf_config)
    return section.seq_length or job.spec.seq_length or usual


class _Shown:
    """What this rank shows of the preparation of a data section: on the console of the main rank,
    and of a rank with a log of its own; and in its log file."""

    def __init__(self, job: Job, name: str, log: Log | None) -> None:
        self.name, self._log = name, log
        self._console = job.console
        if has_own_log() and not job.world.is_main:
            self._console = Console(enabled=True)
        self._began = time.monotonic()
        self._logged: float | None = None

    def log(self, text: str) -> None:
        """A line, when the progress before it is done."""
        self._console.end_progress()
        (self._log or self._console.log)(text)

    def working(self, progress: Progress) -> None:
        """The progress of this rank's own work."""
        part = f"{bar(progress.fraction)} " if progress.fraction is not None else ""
        self._show(f"{part}{progress.gerund} {self.name}: {progress.detail}")

    def waiting(self, rank: int, status: str) -> None:
        """That this rank waits for another one."""
        if time.monotonic() - self._began >= FIRST_SECONDS:
            self._show(f"waiting for rank {rank} to {status or f'prepare {self.name}'}")

    def end(self) -> None:
        """Nothing more is shown."""
        self._console.end_progress()

    def _show(self, text: str) -> None:
        self._console.progress(text, plain_seconds=PLAIN_SECONDS)
        now = time.monotonic()
        if self._logged is None or now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info(text)


def cache_folder(config: Config) -> Path:
    """The folder of the data cache."""
    return Path(config.data_cache.dir or Path(config.output_dir) / "dataset_cache")


def _workers(section: DatasetSection) -> int:
    """Processes that may tokenize on a machine; each of its ranks but one waits meanwhile."""
    processors = len(os.sched_getaffinity(0))
    return min(section.num_parallel_workers or MAX_WORKERS, processors)


def _max_bytes(config: Config) -> int | None:
    size = config.data_cache.max_gb
    return None if size is None else int(size * 1e9)


def _check_same(contents: Sequence[str]) -> None:
    """All ranks have prepared the same tokens; `contents`: the hash of those of each rank."""
    other = next((rank for rank, found in enumerate(contents) if found != contents[0]), None)
    if other is not None:
        raise UserError(
            f"the data on the machine of rank {other} differs from that of rank 0",
            rule="all ranks train on the same rows, which each machine prepares from its own files",
            advice="Copy the same data files and the same tokenizer to every machine",
        )
