"""Rules about the section of TokenFileDataLoader and the headers of its files, before anything
heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.provenance import KeyProblem
from launcher.config.schema import DataLoaderSection
from launcher.data.files import find_files
from launcher.data.token_files.files import check_shapes, end_token
from launcher.data.token_files.header import SUFFIXES, TokenFile, describe
from launcher.errors import UserError
from models.positions import row_length


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
    files = list[TokenFile]()
    for file in found:
        try:
            files.append(describe(file.path, loader.token_dtype))
        except UserError as error:
            yield _problem(check, key, error)
    if len(files) == len(found):
        yield from _together(check, key, loader, files)


def _together(
    check: Check, key: str, loader: DataLoaderSection, files: Sequence[TokenFile]
) -> Iterator[KeyProblem]:
    """The files fit to each other and to seq_length."""
    section, spec = check.value(key.partition(".")[0]), check.spec
    length = section.seq_length
    if length is None and spec is not None:
        length = spec.seq_length or row_length(spec.family, spec.hf_config)
    try:
        check_shapes(files, length)
        end_token(loader, files)
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
