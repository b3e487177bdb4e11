"""Files that change while they are read: an error, and nothing of them is used."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.shard import Shard
from launcher.weights.reading.load import load
from launcher.weights.reading.strided_copy import StridedCopy
from launcher.weights.reading.transfer import Files, read_strided
from launcher.weights.source import open_complete
from tests.weights.test_bad_files import right

WAIT = "Something writes to it: try again when that is done."


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def replace(path: Path) -> None:
    before = path.stat()
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shrink, f"{{file}} has 4100 bytes: it had 4104 when its header was read. {WAIT}"),
        (grow, f"{{file}} has 4108 bytes: it had 4104 when its header was read. {WAIT}"),
        (replace, f"{{file}} was replaced: it must stay as its header was read. {WAIT}"),
        (Path.unlink, "{file} cannot be read: No such file or directory."),
    ],
)
def test_a_file_that_changes_after_its_header_was_read(tmp_path, change, says: str) -> None:
    path = right(tmp_path)
    source = open_complete(path)
    change(path)
    target = Shard((2,), full_box((2,)), torch.full((2,), 3.0))
    with pytest.raises(UserError) as caught:
        load({"w": target}, source)
    assert str(caught.value) == says.format(file=path)
    assert torch.equal(target.tensor, torch.full((2,), 3.0))


@pytest.mark.parametrize(
    "strided_copy",
    [
        pytest.param(StridedCopy(4000, 0, 8000, ()), id="one run"),
        pytest.param(StridedCopy(4000, 0, 8, ((10, 16, 8),)), id="mapped"),
        pytest.param(StridedCopy(4000, 0, 8, ((10, 8, 16),)), id="in one read"),
    ],
)
def test_a_file_that_shrinks_while_it_is_open(tmp_path, strided_copy: StridedCopy) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(20_000))
    with Files() as files:
        files.descriptor(path, 20_000)
        os.truncate(path, 4004)
        with pytest.raises(UserError, match="ended early: it was longer when its header was read"):
            read_strided(files, path, strided_copy, np.empty(20_000, np.uint8))
