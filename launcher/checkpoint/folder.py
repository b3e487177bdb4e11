"""The folder of checkpoints as all ranks together see it: which saves count.

Owns the rule where ranks see several disks: a save that was made on several counts only when every
disk has its whole manifest, the same. What the others lack is named. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.checkpoint.cleanup import unfinished
from launcher.checkpoint.published import Published, published
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups, one_per_machine
from launcher.parallel.world import World
from launcher.weights.ranks.manifests import SEAL


@dataclass(frozen=True)
class PartialSave:
    """A save that some disks have published, and others not."""

    record: str
    sequence: int
    lacking: int
    """The lowest rank that sees a disk without it."""

    def __str__(self) -> str:
        save = self.record.removesuffix(".json")
        return f"passed over {save}: the disk of rank {self.lacking} has no whole manifest of it"


@dataclass(frozen=True)
class Folder:
    """The saves of a folder that count, oldest first, and what else is known of it."""

    root: Path
    candidates: list[Published]
    filesystems: FilesystemGroups = ONE_FILESYSTEM
    """Ranks that see the same; where machines share a disk, more groups than disks."""
    partial_saves: Sequence[PartialSave] = ()
    begun: Collection[str] = ()
    """Records of the saves that were never finished on some disk."""

    @property
    def newest_partial(self) -> int:
        """The highest sequence number of halves that are no remains of a crash; 0 without any."""
        return max(
            (h.sequence for h in self.partial_saves if h.record not in self.begun), default=0
        )


@dataclass(frozen=True)
class _View:
    """What a disk has of saves on several disks: record to (sequence number, seal)."""

    published: Mapping[str, tuple[int, str]]
    unfinished: Collection[str]


def scan(root: Path, world: World) -> Folder:
    """What counts in folder `root`. Called by all ranks together."""
    filesystems = one_per_machine(root, world)
    is_leader = filesystems.is_leader(world)
    here = published(root) if is_leader else []
    candidates = [replace(found, root=root) for found in world.from_main(here)]
    if not filesystems.are_several:
        return Folder(root, candidates)
    view = _View({c.name.record: _identity(c) for c in here if c.is_spread}, unfinished(root))
    reported = world.gather(view if is_leader else None)
    views = {rank: found for rank, found in enumerate(reported) if found is not None}
    partial_saves = list(_partial_saves(views))
    lacking = {half.record for half in partial_saves}
    counted = [c for c in candidates if c.name.record not in lacking]
    begun = {record for found in views.values() for record in found.unfinished}
    return Folder(root, counted, filesystems, partial_saves, begun)


def _identity(save: Published) -> tuple[int, str]:
    return save.sequence, str(save.manifest.get(SEAL))


def _partial_saves(views: Mapping[int, _View]) -> Iterable[PartialSave]:
    """The saves that not all disks have alike, oldest first."""
    known: dict[str, tuple[int, str]] = {}
    for view in views.values():
        for record, identity in view.published.items():
            known[record] = max(identity, known.get(record, identity))
    for record, identity in sorted(known.items(), key=lambda item: item[1]):
        without = [rank for rank, view in views.items() if view.published.get(record) != identity]
        if without:
            yield PartialSave(record, identity[0], min(without))
