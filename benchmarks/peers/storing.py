"""Ways to write what a rank holds, and the jobs of the offline tools beside plain copies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import layout_of
from benchmarks.forks import measure
from benchmarks.peers.loading import as_dtensors, config_of, empty_shards, load_from
from launcher.layout.box import Box
from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.offline.merge import merge
from launcher.weights.offline.slicing import slice_weights
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.source import open_complete
from launcher.weights.streaming.block_file import write_all
from launcher.weights.tensor_mapping import mapped
from models.families import DECODERS
from models.names import mappings_of

State = tuple[Mesh, dict[str, Shard]]
Writer = Callable[[Path, State, int, int], Any]
COPY_BYTES = 16 << 20


def state(config: dict[str, Any], rank: int, ranks: int, mesh: Mesh | None = None) -> State:
    """What a rank holds, in resident memory; tensor parallel unless told otherwise."""
    mesh = mesh or Mesh(tp=ranks)
    mappings = mappings_of(DECODERS[config["model_type"]].parameters)
    held = mapped(empty_shards(layout_of(config, mesh), rank), mappings)
    generator = torch.Generator().manual_seed(rank)
    for shard in held.values():
        bits = shard.tensor.view(torch.int16)
        bits.random_(generator=generator) if bits.numel() < 1 << 20 else bits.fill_(rank + 1)
    return mesh, held


def slipway(folder: Path, given: State, rank: int, ranks: int) -> Any:
    """Our rank file, with layout and checksums."""
    mesh, held = given
    return write_rank_file(folder / f"rank_{rank}.safetensors", held, mesh=mesh, rank=rank)


def raw(folder: Path, given: State, rank: int, ranks: int) -> None:
    """The same bytes, one tensor after the other."""
    descriptor = os.open(folder / f"rank_{rank}.raw", os.O_WRONLY | os.O_CREAT, 0o666)
    position = 0
    for shard in given[1].values():
        memory = memoryview(shard.tensor.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(memory), COPY_BYTES):
            write_all(descriptor, memory[start : start + COPY_BYTES], position + start)
        position += len(memory)
    os.fsync(descriptor)
    os.close(descriptor)


def safetensors(folder: Path, given: State, rank: int, ranks: int) -> None:
    """`safetensors.torch.save_file`, and fsync."""
    from safetensors.torch import save_file

    path = folder / f"rank_{rank}.safetensors"
    save_file({name: shard.tensor for name, shard in given[1].items()}, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def dcp(folder: Path, given: State, rank: int, ranks: int) -> None:
    """torch.distributed.checkpoint, which calls fsync itself."""
    import torch.distributed.checkpoint as dcp

    mesh, held = given
    dcp.save(as_dtensors(mesh, held), checkpoint_id=folder / "dcp", no_dist=ranks == 1)


WRITERS: dict[str, Writer] = {
    "Slipway": slipway, "raw": raw, "safetensors": safetensors, "DCP": dcp,
}  # fmt: skip


def make_sharded(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of four ranks that share parameters by rows: our rank files, and DCP's."""
    mesh = Mesh(dp_shard=4)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))

    def save(given: State, rank: int, ranks: int) -> None:
        place = folder / f"rank_{rank}"
        place.mkdir()
        write_rank_file(place / f"w_rank_{rank}-1_1.safetensors", given[1], mesh=mesh, rank=rank)
        dcp(folder, given, rank, ranks)

    measure(save, 4, group=True, before=partial(state, config, mesh=mesh))


def copied(source: Path, target: Path, rank: int, ranks: int) -> None:
    """Copy the files of a folder, and fsync each: the floor of the offline tools."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*.safetensors")):
        copy = target / path.name
        shutil.copyfile(path, copy)
        descriptor = os.open(copy, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


TOOL_GROUPS = {
    "merge 8 ranks (tp 8)": ("Slipway merge", "copy"),
    "slice to 8 ranks (tp 8)": ("Slipway slice", "copy"),
    "8 redundant ranks to 8 others": ("Slipway, directly", "merge, then slice, then load"),
}
"""What is compared; the first is ours."""
TP, REDUNDANT = Mesh(tp=8), Mesh(dp_replicate=4, tp=2)


@dataclass(frozen=True)
class OurLayout:
    """A layout of Slipway in the form that the slicing tool needs."""

    layout: Layout
    world_size: int
    has_optimizer: bool = True

    @property
    def mesh(self) -> dict[str, int]:
        """Axis to size."""
        return self.layout.mesh.sizes()

    def boxes(self, rank: int) -> dict[str, Box]:
        """Name to the box a rank holds."""
        return {name: placed.boxes[0] for name, placed in self.layout.of(rank).items()}


def sliced(complete: Path, mesh: Mesh, target: Path, rank: int = 0, ranks: int = 1) -> None:
    """The slicing tool, for a dense model."""
    layout = layout_of(config_of(complete), mesh)
    slice_weights(open_complete(complete), OurLayout(layout, mesh.world_size), target,
                  overwrite=True)  # fmt: skip


def merged(folder: Path, target: Path, rank: int, ranks: int) -> None:
    """The merging tool."""
    merge(folder, target, suffix="1_1", overwrite=True)


def loaded(folder: Path, mesh: Mesh, rank: int, ranks: int) -> None:
    """Each rank of `mesh` loads from rank files, one after the other."""
    config, files = config_of(folder), sorted(folder.glob("rank_*/*.safetensors"))
    for target in range(mesh.world_size):
        load_from(open_rank_files(folder, files), config, mesh, target)


def merged_sliced_loaded(folder: Path, scratch: Path, rank: int, ranks: int) -> None:
    """The long way round: complete weights, rank files of the new layout, and each rank loads its
    own."""
    merged(folder, scratch / "whole", rank, ranks)
    shutil.copy2(folder / "config.json", scratch / "whole")
    sliced(scratch / "whole", TP, scratch / "cut")
    shutil.copy2(folder / "config.json", scratch / "cut")
    loaded(scratch / "cut", TP, rank, ranks)


def tool_jobs(scratch: Path, complete: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The jobs of `TOOL_GROUPS`; the rank files that they start from are made here."""
    for name, mesh in {"tp": TP, "redundant": REDUNDANT}.items():
        sliced(complete, mesh, scratch / name)
        (scratch / name / "config.json").write_text(json.dumps(config))
    return {
        "Slipway merge": partial(merged, scratch / "tp", scratch / "merged"),
        "Slipway slice": partial(sliced, complete, TP, scratch / "sliced"),
        "copy": partial(copied, complete, scratch / "copied"),
        "Slipway, directly": partial(loaded, scratch / "redundant", TP),
        "merge, then slice, then load": partial(
            merged_sliced_loaded, scratch / "redundant", scratch
        ),
    }
