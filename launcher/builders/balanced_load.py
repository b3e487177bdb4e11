"""Balanced loading: each byte of storage is read by one rank, which broadcasts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from launcher.builders.job import Job
from launcher.environment import process_environment
from launcher.layout.layout import Layout
from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import on_all_ranks
from launcher.parallel.broadcast_shards import broadcast_shards
from launcher.parallel.world import World
from launcher.weights.ranks.redundancy import file_replicas, replicas_of, writers_of
from launcher.weights.reading.checksums import check_file
from launcher.weights.reading.load import LoadReport, load
from launcher.weights.source import Source
from launcher.weights.tensor_mapping import MappingsOf

Result = TypeVar("Result")


@dataclass(frozen=True)
class BalancedLoad:
    """Which rank reads what, for the tensors of files that this rank holds."""

    world: World
    held: Mapping[str, Shard]
    replica_ranks: Mapping[str, Ranks]
    writer_ranks: Mapping[str, int]

    def reads(self, name: str) -> bool:
        """Whether this rank reads its box of `name`."""
        return self.writer_ranks[name] == self.world.rank

    def load(self, read: Callable[[], Result]) -> Result:
        """The result of `read`, after its tensors were broadcast to their replicas. A `UserError`
        of any rank is raised on every rank."""
        result = on_all_ranks(self.world, read)
        broadcast_shards(self.held, self.writer_ranks, self.replica_ranks)
        return result


def balanced_load(
    world: World, layout: Layout, mappings_of: MappingsOf, held: Mapping[str, Shard]
) -> BalancedLoad:
    """Distribute the reading of `held`, the shards of this rank by name in files."""
    replicas = file_replicas(layout, world.rank, mappings_of)
    return BalancedLoad(world, held, replicas_of(held, replicas), writers_of(held, replicas))


def check_files(world: World, source: Source) -> None:
    """Check the files that have one checksum over all of their bytes, which are read for it: each
    by one rank of each machine. Raises `UserError` on every rank."""
    if any(header.crc for header in source.headers.values()):
        place = process_environment()
        files = [file for file in sorted(source.headers)
                 if source.headers[file].crc and file not in source.elsewhere]  # fmt: skip
        own = files[place.local_rank :: place.local_world_size]
        on_all_ranks(world, lambda: [check_file(file, source.headers[file]) for file in own])


def load_job(
    job: Job, held: Mapping[str, Shard], layout: Layout, mappings_of: MappingsOf, source: Source,
    **options: Any,
) -> LoadReport:  # fmt: skip
    """`load` of `held` on every rank of the job: independently, or together with balanced_load.

    `options` are those of `launcher.weights.reading.load.load`.
    """
    check_files(job.world, source)
    is_single = layout.mesh.world_size == 1
    rank = 0 if is_single else job.world.rank
    if is_single or not job.config.balanced_load:
        alone = partial(load, held, source, rank=rank, **options)
        return on_all_ranks(job.world, alone) if source.is_spread else alone()
    shared = balanced_load(job.world, layout, mappings_of, held)
    return shared.load(lambda: load(held, source, rank=rank, reads=shared.reads, **options))
