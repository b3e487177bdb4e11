"""Preparing the data of a configuration without a run (`--prepare_data`): on a login node, without
a GPU, a process group or a model, for any number of ranks."""

from __future__ import annotations

import numpy as np

from launcher.builders.data import opened
from launcher.builders.job import Job
from launcher.builders.open_dataset import cache_folder
from launcher.config.derived import used_datasets
from launcher.data.rows import COUNTED_AT_ONCE, RowDataset
from launcher.environment import process_environment
from launcher.errors import EXIT_OK


def prepare_data(job: Job) -> int:
    """Prepare the data sections that the configuration uses, and log one line for each: rows,
    tokens, folder. Started as several processes, one on each machine does it."""
    if process_environment().local_rank != 0:
        return EXIT_OK
    for name, section in used_datasets(job.config).items():
        dataset = opened(job, name, section).dataset
        folder = dataset.cached_in or cache_folder(job.config)
        if dataset.stream is not None:
            dataset.stream.close()
            job.log(f"prepared {name}: the index of its stream, in {folder}")
            continue
        job.log(
            f"prepared {name}: {len(dataset):,} rows of {dataset.seq_length}, "
            f"{_tokens(dataset):,} tokens, in {folder}"
        )
    return EXIT_OK


def _tokens(dataset: RowDataset) -> int:
    """Tokens of all rows, without padding."""
    firsts = range(0, len(dataset), COUNTED_AT_ONCE)
    parts = (np.arange(first, min(first + COUNTED_AT_ONCE, len(dataset))) for first in firsts)
    return sum(int(dataset.counts(part).tokens.sum()) for part in parts)
