"""Sight: which rank files of one save a rank sees, which of them it checks, and what it is told of
the others.

Owns who answers for a file whose save lies on several disks: a rank that sees it. Called by all
ranks together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.filesystems import FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.formats.safetensors import Header, read_header


@dataclass(frozen=True)
class FileVisibility:
    """Numbers of files, as one rank has them."""

    share: Sequence[int]
    """Those it checks; every file is checked by one rank."""
    elsewhere: Collection[int] = ()
    """Those it does not see, and others do."""
    hidden: Collection[int] = ()
    """Those that some ranks see and others do not: the same on all ranks."""


def visibility_of(
    files: Sequence[Path], filesystems: FilesystemGroups, world: World
) -> FileVisibility:
    """What this rank sees of `files`; `disks`: the ranks that see the same."""
    everything = range(len(files))
    if not filesystems.are_several:
        return FileVisibility(everything[filesystems.share(world)])
    there = [index for index in everything if files[index].is_file()]
    seen = world.gather(there if filesystems.is_leader(world) else None)
    able: dict[int, list[tuple[int, ...]]] = {}
    for group in filesystems.groups:
        for index in seen[group[0]]:
            able.setdefault(index, []).append(group)
    share = []
    for index in everything:
        groups = able.get(index, filesystems.groups)  # what nobody sees, anyone finds missing
        peers = groups[index % len(groups)]
        share += [index] if peers[index % len(peers)] == world.rank else []
    mine = set(seen[filesystems.peers(world)[0]])
    hidden = {index for index, groups in able.items() if len(groups) < len(filesystems.groups)}
    return FileVisibility(share, hidden - mine, hidden)


def broadcast_headers(
    files: Sequence[Path], visibility: FileVisibility, world: World
) -> dict[Path, Header]:
    """The headers of the files this rank does not see, from the ranks that check them. Raises
    `UserError` on every rank when one cannot be read."""
    checked_here = [index for index in visibility.share if index in visibility.hidden]
    outcome = capture_error(lambda: {index: read_header(files[index]) for index in checked_here})
    known: dict[int, Header] = {}
    for headers in raise_if_any_failed(world, outcome):
        known |= headers
    return {files[index]: known[index] for index in visibility.elsewhere}
