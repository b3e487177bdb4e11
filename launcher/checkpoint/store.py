"""The store: a folder of checkpoints. Saves commit all ranks or nothing; old ones are let go.

    checkpoint/rank_0/CKP_rank_0-1_10.safetensors      1. every rank writes aside, then renames
    checkpoint/state/CKP-1_10.json                     2. rank 0, after all ranks are done
    checkpoint/manifest/CKP-1_10.json                  3. rank 0, last: now the checkpoint exists
    checkpoint/rank_0/meta.json                        4. every rank, for readers of the original

Where ranks see several disks, each has a folder like that, with the files of the ranks that see it
and the same manifest and state: a leader on each does the part of rank 0.

Invariants: a checkpoint counts only with its manifest; a manifest appears only after every file it
names is durable; the oldest checkpoint is deleted only after the newer one is published, its
manifest first. Nothing is deleted that this run did not write, or the run it goes on from.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import (
    json_bytes,
    publish,
    sync_directory,
    temporary,
    write_bytes,
    write_json,
)
from launcher.checkpoint.integrated import remove_integrated
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.published import Published, intent, published, withdraw
from launcher.checkpoint.space import bytes_on_host, room_for
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.parallel.agreement import agree, attempt
from launcher.parallel.disks import ONE_DISK, Disks
from launcher.parallel.world import World
from launcher.weights.formats.note import Inventory
from launcher.weights.ranks.manifests import (
    DISKS,
    MANIFEST_FOLDER,
    STATE_FOLDER,
    digest_of,
    sealed,
)
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.checksums import file_faults
from launcher.weights.reading.memory import Shard

NO_META = "meta.json was not written"
NOT_LET_GO = "older ones were not let go"


@dataclass(frozen=True)
class Saved:
    """What a save did: bytes written by all ranks, and the checkpoints it let go."""

    bytes_written: int
    removed: tuple[SaveName, ...]
    trouble: str = ""
    """What went wrong after it was published; older ones stay then."""


@dataclass(frozen=True)
class Draft:
    """What one disk knows before a save is published there."""

    newest: int
    """The highest sequence number in its folder."""
    saved_at: float
    state: dict[str, Any]
    """Of rank 0."""


@dataclass(frozen=True)
class Store:
    """One run's view of a folder of checkpoints."""

    root: Path
    prefix: str
    counter: int
    keep_max: int
    """How many checkpoints of this run stay; 0: all, or what `keep_minutes` says."""
    inputs: frozenset[Path] = frozenset()
    """Resolved files and folders that are never deleted: what the run was started from."""
    inventory: Inventory | None = None
    """Of what all ranks together save here."""
    keep_minutes: int = 0
    """With `keep_max` 0: of those saved in so many minutes one stays, and the newest; 0: all."""
    disks: Disks = ONE_DISK
    """Which ranks see the folder `root` of which disk."""
    resumed_label: str = ""
    """The run that this one goes on from under another name: its saves count for retention."""

    @property
    def label(self) -> str:
        """Names this run among those of the folder: prefix and counter."""
        return SaveName(self.prefix, self.counter, 1, 1).label

    def is_own(self, name: SaveName) -> bool:
        """Whether this run may delete a save: one that it wrote, or that it goes on from."""
        return name.label in (self.label, self.resumed_label)

    def save(
        self,
        name: SaveName,
        shards: Mapping[str, Shard],
        state: dict[str, Any],
        *,
        mesh: Mesh,
        world: World,
        remove_redundancy: bool = False,
    ) -> Saved:
        """Write and publish one checkpoint. Called on every rank.

        `remove_redundancy` says of `shards` that copies were left to other ranks.
        Raises `UserError` on every rank when any rank could not write; the checkpoints that were
        there are untouched then, and what was written of this one is gone.
        """
        nbytes = bytes_on_host(world, sum(shard.tensor.nbytes for shard in shards.values()))
        begun = False
        try:
            agree(world, attempt(self._prepare, name, world, nbytes))
            begun = True
            outcome = attempt(self._write, name, shards, mesh, world, remove_redundancy)
            files = agree(world, outcome)
            drafts = agree(world, attempt(self._draft, state, world))
            agree(world, attempt(self._publish, name, files, drafts, mesh, world))
        except UserError:
            self._abandon(name, world, begun)
            raise
        nbytes = sum(record["bytes"] for record in files)
        try:
            agree(world, attempt(self._write_meta, name, world), NO_META)
            return Saved(nbytes, self._retain(world))
        except UserError as error:
            return Saved(nbytes, (), error.problems[0].what)

    def settle(self, world: World) -> None:
        """Do what the newest save did not come to after it was published. Called on every rank.

        Raises `UserError`.
        """
        mine = [c for c in world.from_main(published(self.root)) if self.is_own(c.name)]
        if mine:
            agree(world, attempt(self._write_meta, mine[-1].name, world), NO_META)
            self._retain(world)

    def _abandon(self, name: SaveName, world: World, begun: bool) -> None:
        """Remove what a save left that failed; a published one stays.

        It is published when every disk has its manifest; `begun`: none had one before.
        """
        leads = self.disks.leads(world)
        is_there = leads and (self.root / MANIFEST_FOLDER / name.record).exists()
        disks = [there for there in world.gather(is_there if leads else None) if there is not None]
        if all(disks):
            return
        if any(disks) and not begun:
            if leads and not is_there:
                attempt(_remove, [intent(self.root, name)])
            return
        if is_there:
            attempt(withdraw, self.root, [name.record])
        path = self.root / f"rank_{world.rank}" / name.rank_file(world.rank)
        left = [path, temporary(path)]
        world.barrier()  # files first, then what says whose they are
        attempt(_remove, left)
        world.barrier()
        if leads:
            state = self.root / STATE_FOLDER / name.record
            attempt(_remove, [state, temporary(state), intent(self.root, name)])

    def _prepare(self, name: SaveName, world: World, bytes_here: int) -> None:
        (self.root / f"rank_{world.rank}").mkdir(parents=True, exist_ok=True)
        room_for(self.root, bytes_here)
        if self.disks.leads(world):
            for folder in (MANIFEST_FOLDER, STATE_FOLDER):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            published_already = self.root / MANIFEST_FOLDER / name.record
            if published_already.exists():
                raise FileExistsError(errno.EEXIST, "it is published", str(published_already))
            # Says whose files these are, should this save never be finished.
            intent(self.root, name).touch()
            sync_directory(self.root / MANIFEST_FOLDER)

    def _write(
        self, name: SaveName, shards: Mapping[str, Shard], mesh: Mesh, world: World,
        remove_redundancy: bool,
    ) -> dict[str, Any]:  # fmt: skip
        folder = self.root / f"rank_{world.rank}"
        path = folder / name.rank_file(world.rank)
        try:
            header = write_rank_file(
                temporary(path), shards, mesh=mesh, rank=world.rank,
                remove_redundancy=remove_redundancy, inventory=self.inventory,
            )  # fmt: skip
        except BaseException:
            temporary(path).unlink(missing_ok=True)
            raise
        publish(temporary(path), path)
        faults = file_faults(path, header_digest=header.digest, data=False)
        if faults:
            raise OSError(errno.EIO, faults[0], str(path))
        return {
            "rank": world.rank,
            "file": str(path.relative_to(self.root)),
            "bytes": header.file_bytes,
            "header_xxh3_64": header.digest,
        }

    def _draft(self, state: dict[str, Any], world: World) -> Draft | None:
        """What this disk, and rank 0 for all, say of a save to be published."""
        if not self.disks.leads(world):
            return None
        newest = max((checkpoint.sequence for checkpoint in published(self.root)), default=0)
        return Draft(newest, round(time.time(), 3), state if world.is_main else {})

    def _publish(
        self, name: SaveName, files: list[dict[str, Any]], drafts: Sequence[Draft | None],
        mesh: Mesh, world: World,
    ) -> None:  # fmt: skip
        if not self.disks.leads(world):
            return
        if not intent(self.root, name).exists():
            raise OSError(
                errno.EBUSY, "another run that writes here cleared this save away", str(self.root)
            )
        first = drafts[0]
        assert first is not None
        state_text = json_bytes(first.state)
        manifest = {
            "sequence": max(draft.newest for draft in drafts if draft is not None) + 1,
            "saved_at": first.saved_at,
            "save": vars(name),
            "global_step": first.state["global_step"],
            "world_size": mesh.world_size,
            "mesh": mesh.sizes(),
            "files": files,
            **({DISKS: self.disks.groups} if self.disks.are_several else {}),
            "state_xxh3_64": digest_of(state_text),
        }
        write_bytes(self.root / STATE_FOLDER / name.record, state_text)
        write_bytes(self.root / MANIFEST_FOLDER / name.record, sealed(manifest))

    def _is_input(self, checkpoint: Published) -> bool:
        return any(file.resolve() in self.inputs for file in checkpoint.files)

    def _write_meta(self, name: SaveName, world: World) -> None:
        folder = self.root / f"rank_{world.rank}"
        if not (folder / name.rank_file(world.rank)).is_file():
            return  # a save of fewer ranks
        meta = {
            "last_epoch": name.epoch,
            "last_step": name.step,
            "last_ckpt_file": name.rank_file(world.rank),
        }
        write_json(folder / "meta.json", meta, durable=False)

    def _retain(self, world: World) -> tuple[SaveName, ...]:
        """Let the oldest go."""
        old = self._to_go(world)
        # What is let go is first made a save that was never finished: a crash leaves one of those,
        # which the next start clears away.
        agree(world, attempt(self._withdraw, old, world), NOT_LET_GO)
        leads, share = self.disks.leads(world), self.disks.share(world)
        if leads:
            for checkpoint in old:
                remove_integrated(self.root, str(checkpoint.name), self.inputs)
        mine = [file for checkpoint in old for file in checkpoint.files[share]]
        agree(world, attempt(_remove, mine), NOT_LET_GO)
        if leads:
            for checkpoint in old:
                attempt(_remove, [checkpoint.state_path, intent(self.root, checkpoint.name)])
        return tuple(checkpoint.name for checkpoint in old)

    def _to_go(self, world: World) -> list[Published]:
        """The checkpoints that are to go, by what all disks have; none that is an input of one."""
        found: list[list[tuple[Published, bool]]] = self.disks.each(world, NOT_LET_GO, self._known)
        known = {c.name: replace(c, root=self.root) for disk in found for c, _ in disk}
        inputs = {c.name for disk in found for c, is_input in disk if is_input}
        in_order = sorted(known.values(), key=lambda checkpoint: checkpoint.sequence)
        return [c for c in self._superseded(in_order) if c.name not in inputs]

    def _known(self) -> list[tuple[Published, bool]]:
        """Those of this run that this disk has, and whether they are inputs of the run."""
        mine = (c for c in published(self.root) if self.is_own(c.name))
        return [(checkpoint.in_short(), self._is_input(checkpoint)) for checkpoint in mine]

    def _withdraw(self, old: Sequence[Published], world: World) -> None:
        if self.disks.leads(world):
            there = (checkpoint for checkpoint in old if checkpoint.manifest_path.exists())
            withdraw(self.root, [checkpoint.name.record for checkpoint in there])

    def _superseded(self, mine: Sequence[Published]) -> list[Published]:
        """Those that are not to stay, of checkpoints in order; never the newest."""
        if self.keep_max:
            return list(mine[: -self.keep_max])
        if not self.keep_minutes:
            return []
        old, kept_at = [], -math.inf
        for checkpoint in mine[:-1]:
            if not checkpoint.saved_at:
                continue  # nobody wrote down when
            # Before the one that stays: the clock was set back, and minutes are counted anew.
            if 0 <= checkpoint.saved_at - kept_at < 60 * self.keep_minutes:
                old.append(checkpoint)
            else:
                kept_at = checkpoint.saved_at
        return old


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
