"""The golden MindRecord files, unpacked, and values as their expectations have them."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

from launcher.mindspore.mindrecord.reader import Value

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data" / "mindrecord"


def unpack(folder: Path) -> Path:
    """Unpack the golden files into `folder`."""
    with tarfile.open(FIXTURES / "goldens.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def unpack_default_sizes(folder: Path) -> Path:
    """The golden file of the default sizes, 48 MiB."""
    path = folder / "default_sizes.mindrecord"
    path.write_bytes(gzip.decompress((FIXTURES / "default_sizes.mindrecord.gz").read_bytes()))
    return path


def expected(folder: Path, name: str) -> Any:
    """What MindDataset reads."""
    return json.loads((folder / f"{name}.expected.json").read_text())


def plain(value: Value) -> Any:
    """A value as in the expectations: bytes as a list of hex without their last zero bytes."""
    if isinstance(value, bytes):
        return [value.rstrip(b"\0").hex()]
    return value if isinstance(value, str) else value.tolist()
