"""Filesystem groups: which ranks share a file system at a path, and which of them leads there.

    rank          0  1  2  3 | 4  5  6  7     groups ((0, 1, 2, 3), (4, 5, 6, 7)): two file systems,
    file system   A  A  A  A | B  B  B  B     whose leaders are ranks 0 and 4

Ranks of one machine that find the same inode at a path share a file system. Between machines a
token file decides: the leader of each machine writes one, looks for those of the others, and
deletes it. Only runs that save into a folder write tokens there. All functions are collective.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.parallel.all_ranks import P, Result, capture_error, raise_if_any_failed
from launcher.parallel.world import World

TOKEN = ".disk_"
"""Prefix of the names of token files."""
NOT_OPENED = "the folder of checkpoints could not be opened"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class FilesystemGroups:
    """The ranks grouped by file system; without groups, all ranks share one."""

    groups: tuple[tuple[int, ...], ...] = ()
    """The ranks of each file system, in order, where there are several; the lowest rank leads."""

    @property
    def are_several(self) -> bool:
        """Whether the ranks use more than one file system."""
        return len(self.groups) > 1

    def peers(self, world: World) -> Sequence[int]:
        """The ranks that share the file system of this rank, which is one of them."""
        return next((group for group in self.groups if world.rank in group), range(world.size))

    def is_leader(self, world: World) -> bool:
        """Whether this rank acts for those that share its file system."""
        return self.peers(world)[0] == world.rank

    def share(self, world: World) -> slice:
        """The part of this rank in work that its peers divide among themselves."""
        peers = self.peers(world)
        return slice(peers.index(world.rank), None, len(peers))

    def on_each(
        self, world: World, what: str, fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """The results of `fn` on every file system, run by the leaders, in order of the groups.

        Raises `UserError`, which begins with `what`, on every rank when one fails.
        """
        outcome = capture_error(fn, *args, **kwargs) if self.is_leader(world) else None
        return raise_if_any_failed(world, outcome, what)

    def on_own(
        self, world: World, what: str, fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """As `on_each`: the result on the file system of this rank."""
        results = self.on_each(world, what, fn, *args, **kwargs)
        return results[self.groups.index(tuple(self.peers(world))) if self.groups else 0]


ONE_FILESYSTEM = FilesystemGroups()


def one_per_machine(folder: Path, world: World) -> FilesystemGroups:
    """The groups as far as they are known without writing: machines that share a file system are
    counted as several."""
    ranks: dict[Any, list[int]] = {}
    for rank, place in enumerate(world.gather(_place(folder))):
        ranks.setdefault(place, []).append(rank)
    return _groups(ranks.values())


def find_filesystem_groups(folder: Path, world: World, what: str = NOT_OPENED) -> FilesystemGroups:
    """The groups at `folder`, which is created where tokens are needed. Raises `UserError`, which
    begins with `what`."""
    machines = one_per_machine(folder, world)
    if not machines.are_several:
        return machines
    token = folder / f"{TOKEN}{uuid.uuid4().hex}"
    machines.on_each(world, what, _make_ready, folder)
    try:
        names = machines.on_each(world, what, _write_token, token)
        seen = machines.on_each(world, what, _tokens_found, folder, names)
    finally:
        if machines.is_leader(world):
            with suppress(OSError):
                token.unlink(missing_ok=True)
    first_machine = _joined(seen)
    ranks: dict[int, list[int]] = {}
    for machine, group in enumerate(machines.groups):
        ranks.setdefault(first_machine[machine], []).extend(group)
    return _groups(sorted(group) for group in ranks.values())


def _groups(groups: Iterable[Sequence[int]]) -> FilesystemGroups:
    found = tuple(sorted(tuple(group) for group in groups))
    return FilesystemGroups(found if len(found) > 1 else ())


def _place(folder: Path) -> tuple[str, ...]:
    """Equal on two ranks only where they see one folder: the machine, the inode of `folder` or of
    its nearest parent that exists, and the rest of the path."""
    path = folder.absolute()
    for parent in (path, *path.parents):
        with suppress(OSError):
            found = parent.stat()
            return (_machine(), f"{found.st_dev}:{found.st_ino}", str(path.relative_to(parent)))
    return (_machine(), str(path))


def _machine() -> str:
    """Identifies the machine: the same for all of its processes."""
    try:
        return _BOOT.read_text()
    except OSError:
        return os.uname().nodename


def _make_ready(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{TOKEN}*"):  # by a crash
        left.unlink(missing_ok=True)


def _write_token(token: Path) -> str:
    token.touch()
    return token.name


def _tokens_found(folder: Path, names: Sequence[str]) -> list[int]:
    """Indices of the tokens that are found in `folder`."""
    return [index for index, name in enumerate(names) if (folder / name).exists()]


def _joined(found: Sequence[Sequence[int]]) -> list[int]:
    """For each machine the first one that shares its file system; `found`: for each machine, the
    machines whose tokens it finds."""
    first = list(range(len(found)))
    for machine, others in enumerate(found):
        together = {first[other] for other in (machine, *others)}
        first = [min(together) if one in together else one for one in first]
    return first
