"""The source of Python's standard library, as data that every machine has.

Owns which files are taken, and which of them are held out: about one in twenty, chosen by a hash of
its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import UserError

LARGEST_FILE = 400_000
"""Bytes: larger files of the standard library are tables."""
HELDOUT_IN = 20

SKIPPED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages", "ensurepip", "__pycache__", "__phello__"),
        *("test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"),
    }
)
"""Other people's code, tests with broken files on purpose, and tables of character codes."""
SKIPPED_FILE = re.compile(r"_sysconfigdata|^badsyntax")


def standard_library() -> Path:
    """Its folder. Raises UserError where Python was installed without source."""
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "argparse.py").is_file():
        raise UserError(
            f"this Python has no standard library source in {str(folder)!r}",
            rule="the quickstart trains on it",
            advice="Run it with a Python that was installed as files (python.org, pyenv, apt, uv)",
        )
    return folder


def sources(library: Path) -> Iterator[Path]:
    """The files in UTF-8, in the order of their hashes."""
    yield from sorted(_found(library), key=lambda path: _number(path, library))


def is_held_out(path: Path, library: Path) -> bool:
    """Whether a file is for evaluation."""
    return _number(path, library) % HELDOUT_IN == 0


def _found(library: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in names:
            path = Path(folder, name)
            wanted = name.endswith(".py") and not SKIPPED_FILE.search(name)
            if wanted and path.stat().st_size <= LARGEST_FILE and _is_text(path):
                yield path


def _is_text(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _number(path: Path, library: Path) -> int:
    """A number that depends on the name of a file in the library and on nothing else."""
    name = path.relative_to(library).as_posix()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
