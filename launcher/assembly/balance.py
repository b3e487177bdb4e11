"""Balanced loading: each byte of storage is read by one rank, which passes it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from launcher.assembly.job import Job
from launcher.layout.holders import Ranks
from launcher.layout.layout import Layout
from launcher.parallel.agreement import found_by_all
from launcher.parallel.share import share
from launcher.parallel.world import World
from launcher.weights.links import LinksOf
from launcher.weights.ranks.redundancy import file_holders, keepers_of
from launcher.weights.reading.load import LoadReport, load
from launcher.weights.reading.memory import Shard
from launcher.weights.source import Source

Result = TypeVar("Result")


@dataclass(frozen=True)
class Balance:
    """Who reads what, for the tensors of files that this rank holds."""

    world: World
    held: Mapping[str, Shard]
    holders: Mapping[str, Ranks]
    keepers: Mapping[str, int]

    def reads(self, name: str) -> bool:
        """Whether this rank reads its box of `name`."""
        return self.keepers[name] == self.world.rank

    def load(self, read: Callable[[], Result]) -> Result:
        """What `read` gives, after its bytes have gone to all holders; its `UserError` of any rank
        is raised on every rank."""
        result = found_by_all(self.world, read)
        share(self.held, self.keepers, self.holders)
        return result


def balance(world: World, layout: Layout, links_of: LinksOf, held: Mapping[str, Shard]) -> Balance:
    """Share out the reading of `held`, the shards of this rank by name in files."""
    holders = file_holders(layout, world.rank, links_of)
    return Balance(world, held, holders, keepers_of(held, holders))


def load_job(
    job: Job, held: Mapping[str, Shard], layout: Layout, links_of: LinksOf, source: Source,
    **options: Any,
) -> LoadReport:  # fmt: skip
    """`load` of `held` on every rank of the job: each by itself, or with balanced_load together.

    `options` are those of `launcher.weights.reading.load.load`.
    """
    whole = layout.mesh.world_size == 1
    rank = 0 if whole else job.world.rank
    if whole or not job.config.balanced_load:
        alone = partial(load, held, source, rank=rank, **options)
        return found_by_all(job.world, alone) if source.is_spread else alone()
    shared = balance(job.world, layout, links_of, held)
    return shared.load(lambda: load(held, source, rank=rank, reads=shared.reads, **options))
