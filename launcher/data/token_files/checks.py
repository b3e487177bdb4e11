"""Rules about the section of TokenFileDataLoader and the headers of its files, before anything
heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.provenance import KeyProblem
from launcher.config.schema import DataLoaderSection
from launcher.data.files import find_files
from launcher.data.token_files.header import SUFFIXES, describe
from launcher.errors import UserError


def check_loader(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    """The problems of one section. `prefix`: its key."""
    keys = ("dataset_dir", "dataset_files", "data_files")
    key = next((f"{prefix}.{name}" for name in keys if getattr(loader, name)), "")
    if not key:
        return  # reported for all loaders
    try:
        found = find_files(
            loader.paths, SUFFIXES, suffix_advice="It reads .npy, .bin, .u16 and the like"
        )
    except UserError as error:
        if all(Path(path).exists() for path in loader.paths):  # else reported for all loaders
            yield _problem(check, key, error)
        return
    for file in found:
        try:
            describe(file.path, loader.token_dtype)
        except UserError as error:
            yield _problem(check, key, error)


def _problem(check: Check, key: str, error: UserError) -> KeyProblem:
    problem = error.problems[0]
    return check.wrong(
        key,
        problem.rule,
        what=f"{key}: {problem.where}: {problem.what}"
        if problem.where
        else f"{key}: {problem.what.removeprefix('data_loader: ')}",
        nearest=problem.nearest,
        advice=problem.advice,
        also=(f"{key.rpartition('.')[0]}.token_dtype",),
    )
