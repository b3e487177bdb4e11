"""Sight: which rank files of one save a rank sees, which of them it checks, and what it is told of
the others.

Owns who answers for a file whose save lies on several disks: a rank that sees it. Called by all
ranks together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError
from launcher.parallel.disks import Disks
from launcher.parallel.world import World
from launcher.weights.formats.safetensors import Header, read_header


@dataclass(frozen=True)
class Sight:
    """Numbers of files, as one rank has them."""

    share: Sequence[int]
    """Those it checks; every file is checked by one rank."""
    elsewhere: Collection[int] = ()
    """Those it does not see, and others do."""
    hidden: Collection[int] = ()
    """Those that some ranks see and others do not: the same on all ranks."""


def sight_of(files: Sequence[Path], disks: Disks, world: World) -> Sight:
    """What this rank sees of `files`; `disks`: the ranks that see the same."""
    everything = range(len(files))
    if not disks.are_several:
        return Sight(everything[disks.share(world)])
    there = [index for index in everything if files[index].is_file()]
    seen = world.gather(there if disks.leads(world) else None)
    able: dict[int, list[tuple[int, ...]]] = {}
    for group in disks.groups:
        for index in seen[group[0]]:
            able.setdefault(index, []).append(group)
    share = []
    for index in everything:
        groups = able.get(index, disks.groups)  # what nobody sees, anyone finds missing
        mates = groups[index % len(groups)]
        share += [index] if mates[index % len(mates)] == world.rank else []
    mine = set(seen[disks.mates(world)[0]])
    hidden = {index for index, groups in able.items() if len(groups) < len(disks.groups)}
    return Sight(share, hidden - mine, hidden)


def told_headers(files: Sequence[Path], sight: Sight, world: World) -> dict[Path, Header]:
    """The headers of the files this rank does not see, from the ranks that check them. Raises
    `UserError` on every rank when one cannot be read."""
    mine, problems = dict[int, Header](), None
    try:
        mine = {index: read_header(files[index]) for index in sight.share if index in sight.hidden}
    except UserError as error:
        problems = error.problems
    told = world.gather((mine, problems))
    for _, found in told:
        if found:
            raise UserError(found)
    known = {index: header for part, _ in told for index, header in part.items()}
    return {files[index]: known[index] for index in sight.elsewhere}
