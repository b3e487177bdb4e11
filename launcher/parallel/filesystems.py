"""Disks: which ranks see one folder of checkpoints, and which of them acts there for the others.

    rank    0  1  2  3 | 4  5  6  7       groups ((0, 1, 2, 3), (4, 5, 6, 7)): two disks,
    disk    A  A  A  A | B  B  B  B       whose leaders are ranks 0 and 4

Owns the groups of ranks. Ranks of one machine that find the same folder at a path see one disk.
Whether machines do, a token shows, which one rank of each writes and takes away again: only who
saves into a folder writes one. Called by all ranks together.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.world import World

TOKEN = ".disk_"
"""Begins the names of tokens."""
NOT_OPENED = "the folder of checkpoints could not be opened"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class FilesystemGroups:
    """The ranks by the disk they see; as it is made, all see one."""

    groups: tuple[tuple[int, ...], ...] = ()
    """Where there are several, the ranks of each, in order; the lowest of them leads."""

    @property
    def are_several(self) -> bool:
        """Whether some rank does not see what another writes."""
        return len(self.groups) > 1

    def peers(self, world: World) -> Sequence[int]:
        """The ranks that see the disk of this one, itself among them."""
        return next((group for group in self.groups if world.rank in group), range(world.size))

    def is_leader(self, world: World) -> bool:
        """Whether this rank acts for those that see its disk."""
        return self.peers(world)[0] == world.rank

    def share(self, world: World) -> slice:
        """What falls to this rank of work that is shared out on each disk."""
        peers = self.peers(world)
        return slice(peers.index(world.rank), None, len(peers))

    def on_each(self, world: World, what: str, action: Any, *arguments: Any) -> list[Any]:
        """What `action` gives on every disk, done by its leader. Raises `UserError` on every rank,
        which says `what`, when one fails."""
        done = capture_error(action, *arguments) if self.is_leader(world) else (None, None)
        leaders = [group[0] for group in self.groups] or [0]
        results = raise_if_any_failed(world, done, what)
        return [results[leader] for leader in leaders]

    def on_own(self, world: World, what: str, action: Any, *arguments: Any) -> Any:
        """As `each`: what `action` gives on the disk of this rank."""
        done = capture_error(action, *arguments) if self.is_leader(world) else (None, None)
        return raise_if_any_failed(world, done, what)[self.peers(world)[0]]


ONE_FILESYSTEM = FilesystemGroups()


def one_per_machine(folder: Path, world: World) -> FilesystemGroups:
    """Ranks that certainly see one disk at `folder`, those of each machine: nothing is written, and
    machines that share a disk count as several."""
    ranks: dict[Any, list[int]] = {}
    for rank, place in enumerate(world.gather(_place(folder))):
        ranks.setdefault(place, []).append(rank)
    return _groups(ranks.values())


def find_filesystem_groups(folder: Path, world: World, what: str = NOT_OPENED) -> FilesystemGroups:
    """The disks at `folder`, which is made where it has to be looked into. Raises `UserError`,
    which says `what`."""
    machines = one_per_machine(folder, world)
    if not machines.are_several:
        return machines
    token = folder / f"{TOKEN}{uuid.uuid4().hex}"
    machines.on_each(world, what, _make_ready, folder)
    try:
        names = machines.on_each(world, what, _drop, token)
        seen = machines.on_each(world, what, _look, folder, names)
    finally:
        if machines.is_leader(world):
            with suppress(OSError):
                token.unlink(missing_ok=True)
    leaders = [group[0] for group in machines.groups]
    home = _joined(
        {leader: {leaders[i] for i in at} for leader, at in zip(leaders, seen, strict=True)}
    )
    ranks: dict[int, list[int]] = {}
    for group in machines.groups:
        ranks.setdefault(home[group[0]], []).extend(group)
    return _groups(sorted(group) for group in ranks.values())


def _groups(groups: Iterable[Sequence[int]]) -> FilesystemGroups:
    found = tuple(sorted(tuple(group) for group in groups))
    return FilesystemGroups(found if len(found) > 1 else ())


def _place(folder: Path) -> tuple[str, ...]:
    """Equal on two ranks only where they have one folder: the machine, the file on it that lies at
    `folder`, or at the nearest parent that is there, and what is missing to it."""
    path = folder.absolute()
    for parent in (path, *path.parents):
        with suppress(OSError):
            found = parent.stat()
            return (_machine(), f"{found.st_dev}:{found.st_ino}", str(path.relative_to(parent)))
    return (_machine(), str(path))


def _machine() -> str:
    """One for all processes of a machine, and no other machine's."""
    try:
        return _BOOT.read_text()
    except OSError:
        return os.uname().nodename


def _make_ready(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{TOKEN}*"):  # by a crash
        left.unlink(missing_ok=True)


def _drop(token: Path) -> str:
    token.touch()
    return token.name


def _look(folder: Path, names: Sequence[str]) -> list[int]:
    """Which of the tokens are to be seen."""
    return [index for index, name in enumerate(names) if (folder / name).exists()]


def _joined(seen: Mapping[int, Collection[int]]) -> dict[int, int]:
    """Leader to the lowest of those that see its disk: who sees the token of another, shares it."""
    home = {leader: leader for leader in seen}
    for leader, others in seen.items():
        together = {home[other] for other in (leader, *others)}
        if len(together) > 1:
            home = {one: min(together) if at in together else at for one, at in home.items()}
    return home
