"""Names of the sources of a mixture.

Owns how a source is called in messages, metrics and checkpoints. Imports nothing heavy.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import PurePath

from launcher.config.schema import MixtureSourceSection

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a name may be: it is a part of the keys of metrics."""


def source_names(sources: Sequence[MixtureSourceSection]) -> list[str]:
    """The names of the entries of a list of data loaders, in order."""
    return [source.name or _of_path(source, index) for index, source in enumerate(sources)]


def _of_path(source: MixtureSourceSection, index: int) -> str:
    """The last part of the first path that is not a pattern, without the ending of a file."""
    parts = PurePath(source.paths[0]).parts if source.paths else ()
    plain = [part for part in parts if not glob.has_magic(part) and part.strip("./\\")]
    stem = PurePath(plain[-1]).stem if plain else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-")
    return name or f"source{index}"
