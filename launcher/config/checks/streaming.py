"""Rules about `streaming`: where it is possible, what it needs, and the URLs it reads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.config.checks.check import Check
from launcher.config.derived import is_evaluation, used_datasets
from launcher.config.provenance import KeyProblem
from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.errors import shown_url

_ONLY_STREAMING = ("shuffle_buffer", "streaming_cache_gb")
_CHAIN = re.compile(r"^\w+::|::\w+://")
"""Of fsspec: `simplecache::https://...`, `zip://...::https://...`."""


def streams(check: Check) -> Iterator[KeyProblem]:
    """A stream is the one source of a training of known length; only streams read URLs."""
    if check.config.only_save_strategy:
        return
    for name, section in used_datasets(check.config).items():
        yield from _dataset(check, name, section)
        if is_evaluation(name):
            yield from _evaluation(check, name, section)
        else:
            yield from _length(check, section)


def _length(check: Check, section: DatasetSection) -> Iterator[KeyProblem]:
    key = next((key for key, loader in section.loaders.items() if loader.streaming), None)
    if key is not None and check.config.runner_config.max_steps is None:
        yield check.wrong(
            "runner_config.max_steps",
            f"train_dataset.{key}.streaming needs it: how many rows a pass over the data has is "
            "known only at its end",
            what="runner_config.max_steps is missing",
            advice="Set the length of the run in optimizer steps",
            also=(f"train_dataset.{key}.streaming",),
        )


def _evaluation(check: Check, name: str, section: DatasetSection) -> Iterator[KeyProblem]:
    for key, loader in section.loaders.items():
        if loader.streaming:
            yield check.wrong(
                f"{name}.{key}.streaming",
                "an evaluation reads all of its rows, equally many on every rank",
                nearest="Nearest: False, with num_samples for a part of large files",
            )


def _dataset(check: Check, name: str, section: DatasetSection) -> Iterator[KeyProblem]:
    is_mixture = isinstance(section.data_loader, list)
    for key, loader in section.loaders.items():
        prefix = f"{name}.{key}"
        if loader.streaming and is_mixture:
            yield check.wrong(
                f"{prefix}.streaming",
                "a source of a mixture has a known number of rows",
                nearest="Nearest: False",
                advice="Stream one source, or tokenize the sources of the mixture into the cache",
            )
        if loader.streaming:
            yield from _needs_all_records(check, prefix, loader)
        # `streaming: False` turns a stream off, and its settings may stay.
        is_off = not loader.streaming and not check.provenance.is_written(f"{prefix}.streaming")
        for option in _ONLY_STREAMING:
            default = getattr(DataLoaderSection(), option)
            if getattr(loader, option) != default and is_off:
                yield check.wrong(
                    f"{prefix}.{option}",
                    "it acts with streaming alone",
                    advice=f"Set {prefix}.streaming: True, or remove it",
                    also=(f"{prefix}.streaming",),
                )
        yield from _urls(check, prefix, loader)


def _needs_all_records(
    check: Check, prefix: str, loader: DataLoaderSection
) -> Iterator[KeyProblem]:
    is_part = any(mark in loader.split for mark in "[+")
    others = ("csv", "arrow", "text")
    for key, is_wrong, rule in (
        ("transforms", bool(loader.transforms), "a stream has no steps over all records"),
        ("split", is_part, "a stream reads one complete split"),
        ("path", loader.record_format in others, "JSON lines and Parquet can be streamed"),
    ):
        if is_wrong:
            advice = f"Set {prefix}.streaming: False, or prepare the files so before the run"
            yield check.wrong(f"{prefix}.{key}", rule, advice=advice)


def _urls(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    for key in ("dataset_dir", "dataset_files", "data_files"):
        value = getattr(loader, key)
        for path in [value] if isinstance(value, str) else value or []:
            if "://" not in path:
                continue
            shown, server = shown_url(path), path.partition("://")[2].partition("/")[0]
            if _CHAIN.search(path):
                yield check.wrong(
                    f"{prefix}.{key}",
                    "a URL has one protocol",
                    what=f"{prefix}.{key} = a chain of URLs",
                    nearest="Nearest: the URL of a file, a folder or a glob, as in https://host/*",
                    advice="Unpack archives; files need no cache, because they are read in ranges",
                )
            elif "@" in server:
                yield check.wrong(
                    f"{prefix}.{key}",
                    "a URL must not hold credentials: the configuration is written to the output "
                    "and to every checkpoint",
                    what=f"{prefix}.{key} = a URL with a user or password for {shown!r}",
                    nearest=f"Nearest: {shown}",
                    advice="Give credentials by the environment variables of the storage, or in "
                    "~/.config/fsspec",
                )
            elif not loader.streaming:
                yield check.wrong(
                    f"{prefix}.{key}",
                    "URLs are read by a stream alone",
                    what=f"{prefix}.{key} = {shown!r}",
                    advice=f"Set {prefix}.streaming: True, or copy the files to this machine",
                    also=(f"{prefix}.streaming",),
                )
