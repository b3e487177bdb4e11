"""A folder of checkpoints as all ranks together see it.

Owns the rule for several file systems: a save exists only when each of them has the same manifest.
The others are partial saves, which are logged and skipped. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.checkpoint.catalog import Published, published, unfinished
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups, one_per_machine
from launcher.parallel.world import World
from launcher.weights.ranks.manifests import SEAL


@dataclass(frozen=True)
class PartialSave:
    """A save that is published on some file systems only."""

    record: str
    sequence: int
    missing_on: int
    """The lowest rank on a file system without it."""

    def __str__(self) -> str:
        save = self.record.removesuffix(".json")
        return f"skipped {save}: the file system of rank {self.missing_on} has no valid manifest"


@dataclass(frozen=True)
class Folder:
    """The saves of a folder that exist on all file systems, oldest first, and the others."""

    root: Path
    candidates: list[Published]
    filesystems: FilesystemGroups = ONE_FILESYSTEM
    """One group for each machine: machines that share a file system are counted apart."""
    partial_saves: Sequence[PartialSave] = ()
    begun: Collection[str] = ()
    """Records of the saves that are unfinished on some file system."""

    @property
    def newest_partial(self) -> int:
        """The highest sequence number of partial saves that no crash explains; 0 without any."""
        return max(
            (s.sequence for s in self.partial_saves if s.record not in self.begun), default=0
        )


@dataclass(frozen=True)
class _View:
    """The saves on several file systems that one of them has."""

    published: Mapping[str, tuple[int, str]]
    """Record to (sequence number, seal of the manifest)."""
    unfinished: Collection[str]


def scan(root: Path, world: World) -> Folder:
    """The saves in folder `root`. Called by all ranks together."""
    filesystems = one_per_machine(root, world)
    is_leader = filesystems.is_leader(world)
    here = published(root) if is_leader else []
    candidates = [replace(save, root=root) for save in world.from_main(here)]
    if not filesystems.are_several:
        return Folder(root, candidates)
    view = _View({s.name.record: _identity(s) for s in here if s.is_spread}, unfinished(root))
    gathered = world.gather(view if is_leader else None)
    views = {rank: found for rank, found in enumerate(gathered) if found is not None}
    partial_saves = list(_partial_saves(views))
    partial = {save.record for save in partial_saves}
    complete = [save for save in candidates if save.name.record not in partial]
    begun = {record for found in views.values() for record in found.unfinished}
    return Folder(root, complete, filesystems, partial_saves, begun)


def _identity(save: Published) -> tuple[int, str]:
    return save.sequence, str(save.manifest.get(SEAL))


def _partial_saves(views: Mapping[int, _View]) -> Iterable[PartialSave]:
    """The saves that differ between file systems, oldest first."""
    known: dict[str, tuple[int, str]] = {}
    for view in views.values():
        for record, identity in view.published.items():
            known[record] = max(identity, known.get(record, identity))
    for record, identity in sorted(known.items(), key=lambda item: item[1]):
        missing = [rank for rank, view in views.items() if view.published.get(record) != identity]
        if missing:
            yield PartialSave(record, identity[0], min(missing))
