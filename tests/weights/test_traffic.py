"""Traffic: how many bytes of files a job reads, against what its ranks need."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.layout.layout import Layout, ShardSpec
from launcher.layout.mesh import Mesh
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading import pages, transfer, window
from launcher.weights.reading.load import load
from launcher.weights.source import Source, open_complete
from tests.ranks import run_ranks
from tests.weights.worlds import shards

ROWS, COLUMNS = 64, 1 << 14
CUTS = {
    "rows": (ShardSpec(0), Mesh(tp=4)),
    "columns": (ShardSpec(1), Mesh(tp=2)),
    "data parallel": (ShardSpec(), Mesh(dp_shard=4)),
    "experts": (ShardSpec(expert=True), Mesh(dp_shard=4, ep=4)),
    "stages": (ShardSpec(stages=(1,)), Mesh(pp=2, tp=2)),
    "rows, columns are cut in the files": (ShardSpec(0), Mesh(tp=4)),
    "short columns": (ShardSpec(1), Mesh(tp=32)),
}


class Traffic:
    """Bytes of files that were read, and of windows of files that were mapped to be read; without
    what is mapped for large pages, where the system has them."""

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
        patch.setattr(window.mmap, "mmap", counting_map)
        patch.setattr(pages, "are_allowed", lambda: False)


@pytest.mark.parametrize("name", CUTS)
def test_a_job_reads_what_its_ranks_need(tmp_path, monkeypatch, name: str) -> None:
    """Runs of 16 KiB and longer are read: 1.02 times that at most. Shorter ones are looked at in
    windows of the file, which together are no larger than the file and the rest of a page."""
    cut, mesh = CUTS[name]
    values = {"w": torch.zeros(ROWS, COLUMNS)}
    file_cut = ShardSpec(1) if "cut in the files" in name else cut
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
    assert needed == values["w"].nbytes * replica_ranks(name)
    if traffic.mapped:
        assert name == "short columns"
        assert traffic.read == 0
    else:
        assert needed <= traffic.read <= 1.02 * needed


def replica_ranks(name: str) -> int:
    """How often a job holds each element."""
    return 2 if name == "stages" else 1


def source_of(
    folder: Path, values: dict[str, torch.Tensor], cut: ShardSpec, is_cut: bool
) -> Source:
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


@pytest.mark.parametrize("cut", [ShardSpec(0), ShardSpec(1)], ids=["long runs", "short runs"])
def test_what_the_system_counts(tmp_path, cut: ShardSpec) -> None:
    """By the counters of the processes, from a cold cache: what four ranks ask for (`rchar`), and
    what the disk gives them (`read_bytes`, where a file system counts it) for rows of 8 KiB."""
    shape = (4096, 2048)
    save_file({"w": torch.zeros(shape)}, tmp_path / "model.safetensors")
    descriptor = os.open(tmp_path / "model.safetensors", os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    counted = run_ranks(4, counted_load, str(tmp_path), shape, cut)
    needed = 4 * shape[0] * shape[1]
    asked, given = (sum(values) for values in zip(*counted, strict=True))
    assert asked <= (1.02 if cut == ShardSpec(0) else 1.25) * needed
    assert given <= 1.25 * needed


def counted_load(folder: str, shape: tuple[int, int], cut: ShardSpec) -> tuple[int, int]:
    """A rank's load of its part of `w`: bytes asked of files, bytes fetched from the disk."""
    layout = Layout({"w": shape}, Mesh(tp=4), {"w": cut})
    rank = int(os.environ["RANK"])
    held = shards(layout, rank, {"w": torch.zeros(shape)})
    before = counters()
    load(held, open_complete(Path(folder)), rank=rank, expected={"w": shape})
    asked, given = (now - then for now, then in zip(counters(), before, strict=True))
    return asked, given


def counters() -> tuple[int, int]:
    """(rchar, read_bytes) of this process."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    values = {name: int(value) for name, value in lines}
    return values["rchar"], values["read_bytes"]
