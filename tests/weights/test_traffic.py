"""Traffic: how many bytes of files a job reads, against what its ranks need."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.layout.layout import Cut, Layout
from launcher.layout.mesh import Mesh
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading import transfer
from launcher.weights.reading.load import load
from launcher.weights.source import Source, open_complete
from tests.weights.worlds import shards

ROWS, COLUMNS = 64, 1 << 14
CUTS = {
    "rows": (Cut(0), Mesh(tp=4)),
    "columns": (Cut(1), Mesh(tp=2)),
    "data parallel": (Cut(), Mesh(dp_shard=4)),
    "experts": (Cut(expert=True), Mesh(dp_shard=4, ep=4)),
    "stages": (Cut(stages=(1,)), Mesh(pp=2, tp=2)),
    "rows, columns are cut in the files": (Cut(0), Mesh(tp=4)),
    "short columns": (Cut(1), Mesh(tp=32)),
}


class Traffic:
    """Bytes of files that were read, and of windows of files that were mapped."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read = self.mapped = 0
        original_read, original_map = os.preadv, mmap.mmap

        def counting_read(descriptor, buffers, position, *flags):
            count = original_read(descriptor, buffers, position, *flags)
            self.read += count
            return count

        def counting_map(descriptor, length, **options):
            self.mapped += length
            return original_map(descriptor, length, **options)

        patch.setattr(transfer.os, "preadv", counting_read)
        patch.setattr(transfer.mmap, "mmap", counting_map)


@pytest.mark.parametrize("name", CUTS)
def test_a_job_reads_what_its_ranks_need(tmp_path, monkeypatch, name: str) -> None:
    """Runs of 16 KiB and longer are read: 1.02 times that at most. Shorter ones are looked at in
    windows of the file, which together are no larger than the file and the rest of a page."""
    cut, mesh = CUTS[name]
    values = {"w": torch.zeros(ROWS, COLUMNS)}
    file_cut = Cut(1) if "cut in the files" in name else cut
    source = source_of(tmp_path, values, file_cut, "cut in the files" in name)
    layout = Layout({"w": (ROWS, COLUMNS)}, mesh, {"w": cut})
    traffic, needed = Traffic(monkeypatch), 0
    for rank in range(mesh.world_size):
        before = traffic.read, traffic.mapped
        held = shards(layout, rank, values)
        needed += sum(shard.tensor.nbytes for shard in held.values())
        load(held, source, rank=rank, expected={"w": (ROWS, COLUMNS)})
        file_bytes = sum(header.file_bytes for header in source.headers.values())
        rank_read = traffic.read - before[0] + traffic.mapped - before[1]
        assert rank_read <= file_bytes + mmap.ALLOCATIONGRANULARITY
    assert needed == values["w"].nbytes * holders(name)
    if traffic.mapped:
        assert name == "short columns"
        assert traffic.read == 0
    else:
        assert needed <= traffic.read <= 1.02 * needed


def holders(name: str) -> int:
    """How often a job holds each element."""
    return 2 if name == "stages" else 1


def source_of(folder: Path, values: dict[str, torch.Tensor], cut: Cut, is_cut: bool) -> Source:
    """The values in one file, or cut over two ranks."""
    if not is_cut:
        save_file(values, folder / "model.safetensors")
        return open_complete(folder)
    mesh, files = Mesh(tp=2), []
    layout = Layout({n: tuple(t.shape) for n, t in values.items()}, mesh, {"w": cut})
    for rank in range(2):
        files.append(folder / f"{rank}.safetensors")
        write_rank_file(files[-1], shards(layout, rank, values), mesh=mesh, rank=rank)
    return open_rank_files(folder, files)
