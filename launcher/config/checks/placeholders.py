"""Rules about files that are placeholders: git-lfs pointers and web pages.

Owns where they are searched for: in the files of a tokenizer and in data. `weights.damage` checks
weights; `derived` checks config.json and generation_config.json. The first bytes of some files are
read.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.derived import tokenizer_dir, used_datasets
from launcher.config.provenance import KeyProblem
from launcher.errors import Problem
from launcher.weights.formats.placeholders import is_pointer, placeholder
from launcher.weights.formats.tokenizer_files import TOKENIZER_EXTRA_FILES, TOKENIZER_FILES

HUB_FILES = (*TOKENIZER_FILES, *TOKENIZER_EXTRA_FILES)
_BINARY_OR_JSON = (".json", ".model")
"""Suffixes of files that are never empty or a web page; others can only be pointers."""
LOOKED_AT = 64
"""How many files of a data set are checked."""


def hub_files(check: Check) -> Iterator[KeyProblem]:
    """The files of the tokenizer are downloaded."""
    folders = {
        "pretrained_model_dir": check.config.pretrained_model_dir,
        "processor.tokenizer.pretrained_model_dir": tokenizer_dir(check.config),
    }
    looked_at = set[str]()
    for key, folder in folders.items():
        if folder and folder not in looked_at:
            looked_at.add(folder)
            for name in HUB_FILES:
                path = Path(folder, name)
                is_sure = path.suffix in _BINARY_OR_JSON or is_pointer(path)
                if is_sure and (found := placeholder(path, is_text=True)):
                    yield _problem(check, key, found)


def data_files(check: Check) -> Iterator[KeyProblem]:
    """The files of data are downloaded."""
    sections = {} if check.config.only_save_strategy else used_datasets(check.config)
    for name, section in sections.items():
        for loader, source in section.loaders.items():
            named: dict[str, list[str]] = {}
            for key, path in source.sources():
                named.setdefault(f"{name}.{loader}.{key}", []).append(path)
            for key, paths in named.items():
                for path in itertools.islice(_files(paths), LOOKED_AT):
                    if is_pointer(path) and (found := placeholder(path, is_text=True)):
                        yield _problem(check, key, found)


def _files(named: list[str]) -> Iterator[Path]:
    """The files that a key of data names: by themselves, in folders, or by a pattern."""
    for written in named:
        paths = [written] if Path(written).exists() else glob.iglob(written, recursive=True)
        for path in map(Path, paths):
            yield from sorted(path.iterdir()) if path.is_dir() else [path]


def _problem(check: Check, key: str, found: Problem) -> KeyProblem:
    return check.wrong(key, found.rule, what=found.what, advice=found.advice)
