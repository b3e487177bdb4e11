"""File visibility: which rank files of one save a rank can read, and which of them it checks.

Every file is checked by one rank that can read it, also where the save is on several file systems.
Called by all ranks together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.filesystems import FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.formats import rank_header_of
from launcher.weights.formats.safetensors import Header


@dataclass(frozen=True)
class FileVisibility:
    """Indices of files, for one rank."""

    share: Sequence[int]
    """Files that this rank checks; every file is checked by one rank."""
    elsewhere: Collection[int] = ()
    """Files that this rank cannot read, and others can."""
    hidden: Collection[int] = ()
    """Files that some rank cannot read: the same on all ranks."""


def visibility_of(
    files: Sequence[Path], filesystems: FilesystemGroups, world: World
) -> FileVisibility:
    """Which of `files` this rank can read and checks, given the groups that share them."""
    everything = range(len(files))
    if not filesystems.are_several:
        return FileVisibility(everything[filesystems.share(world)])
    here = [index for index in everything if files[index].is_file()]
    readable = world.gather(here if filesystems.is_leader(world) else None)
    readers: dict[int, list[tuple[int, ...]]] = {}
    for group in filesystems.groups:
        for index in readable[group[0]]:
            readers.setdefault(index, []).append(group)
    share = []
    for index in everything:
        groups = readers.get(index, filesystems.groups)  # any rank can find it missing
        peers = groups[index % len(groups)]
        share += [index] if peers[index % len(peers)] == world.rank else []
    mine = set(readable[filesystems.peers(world)[0]])
    hidden = {index for index, groups in readers.items() if len(groups) < len(filesystems.groups)}
    return FileVisibility(share, hidden - mine, hidden)


def broadcast_headers(
    files: Sequence[Path], visibility: FileVisibility, world: World
) -> dict[Path, Header]:
    """The headers of the files that this rank cannot read, from the ranks that check them. Raises
    `UserError` on every rank when one is damaged."""
    checked_here = [index for index in visibility.share if index in visibility.hidden]
    outcome = capture_error(lambda: {index: rank_header_of(files[index]) for index in checked_here})
    known: dict[int, Header] = {}
    for headers in raise_if_any_failed(world, outcome):
        known |= headers
    return {files[index]: known[index] for index in visibility.elsewhere}
