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
from collections.abc import Callable, Mapping, Sequence
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
from launcher.checkpoint.published import Published, in_progress_marker, published, unpublish
from launcher.checkpoint.space import bytes_on_host, room_for
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import P, Result, capture_error, raise_if_any_failed
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import Inventory
from launcher.weights.ranks.manifests import (
    DISKS,
    MANIFEST_FOLDER,
    STATE_FOLDER,
    digest_of,
    sealed,
)
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.checksums import file_faults

NOT_SAVED = "the checkpoint could not be saved"
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
class ManifestInputs:
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
    filesystems: FilesystemGroups = ONE_FILESYSTEM
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
            _save_together(world, self._prepare, name, world, nbytes)
            begun = True
            files = _save_together(world, self._write, name, shards, mesh, world, remove_redundancy)
            inputs_of_disks = _save_together(world, self._manifest_inputs, state, world)
            _save_together(world, self._publish, name, files, inputs_of_disks, mesh, world)
        except UserError:
            self._abandon(name, world, begun)
            raise
        nbytes = sum(record["bytes"] for record in files)
        try:
            raise_if_any_failed(world, capture_error(self._write_meta, name, world), NO_META)
            return Saved(nbytes, self._retain(world))
        except UserError as error:
            return Saved(nbytes, (), error.problems[0].what)

    def finish_interrupted_save(self, world: World) -> None:
        """Do what the newest save did not come to after it was published. Called on every rank.

        Raises `UserError`.
        """
        mine = [c for c in world.from_main(published(self.root)) if self.is_own(c.name)]
        if mine:
            raise_if_any_failed(
                world, capture_error(self._write_meta, mine[-1].name, world), NO_META
            )
            self._retain(world)

    def _abandon(self, name: SaveName, world: World, begun: bool) -> None:
        """Remove what a save left that failed; a published one stays.

        It is published when every disk has its manifest; `begun`: none had one before.
        """
        is_leader = self.filesystems.is_leader(world)
        is_there = is_leader and (self.root / MANIFEST_FOLDER / name.record).exists()
        filesystems = [
            there for there in world.gather(is_there if is_leader else None) if there is not None
        ]
        if all(filesystems):
            return
        if any(filesystems) and not begun:
            if is_leader and not is_there:
                capture_error(_remove, [in_progress_marker(self.root, name)])
            return
        if is_there:
            capture_error(unpublish, self.root, [name.record])
        path = self.root / f"rank_{world.rank}" / name.rank_file(world.rank)
        left = [path, temporary(path)]
        world.barrier()  # files first, then what says whose they are
        capture_error(_remove, left)
        world.barrier()
        if is_leader:
            state = self.root / STATE_FOLDER / name.record
            capture_error(_remove, [state, temporary(state), in_progress_marker(self.root, name)])

    def _prepare(self, name: SaveName, world: World, bytes_here: int) -> None:
        (self.root / f"rank_{world.rank}").mkdir(parents=True, exist_ok=True)
        room_for(self.root, bytes_here)
        if self.filesystems.is_leader(world):
            for folder in (MANIFEST_FOLDER, STATE_FOLDER):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            published_already = self.root / MANIFEST_FOLDER / name.record
            if published_already.exists():
                raise FileExistsError(errno.EEXIST, "it is published", str(published_already))
            # Says whose files these are, should this save never be finished.
            in_progress_marker(self.root, name).touch()
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

    def _manifest_inputs(self, state: dict[str, Any], world: World) -> ManifestInputs | None:
        """What this disk, and rank 0 for all, say of a save to be published."""
        if not self.filesystems.is_leader(world):
            return None
        newest = max((checkpoint.sequence for checkpoint in published(self.root)), default=0)
        return ManifestInputs(newest, round(time.time(), 3), state if world.is_main else {})

    def _publish(
        self, name: SaveName, files: list[dict[str, Any]],
        inputs_of_disks: Sequence[ManifestInputs | None],
        mesh: Mesh, world: World,
    ) -> None:  # fmt: skip
        if not self.filesystems.is_leader(world):
            return
        if not in_progress_marker(self.root, name).exists():
            raise OSError(
                errno.EBUSY, "another run that writes here cleared this save away", str(self.root)
            )
        first = inputs_of_disks[0]
        assert first is not None
        state_text = json_bytes(first.state)
        manifest = {
            "sequence": max(draft.newest for draft in inputs_of_disks if draft is not None) + 1,
            "saved_at": first.saved_at,
            "save": vars(name),
            "global_step": first.state["global_step"],
            "world_size": mesh.world_size,
            "mesh": mesh.sizes(),
            "files": files,
            **({DISKS: self.filesystems.groups} if self.filesystems.are_several else {}),
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
        old = self._expired(world)
        # What is let go is first made a save that was never finished: a crash leaves one of those,
        # which the next start clears away.
        raise_if_any_failed(world, capture_error(self._unpublish, old, world), NOT_LET_GO)
        is_leader, share = self.filesystems.is_leader(world), self.filesystems.share(world)
        if is_leader:
            for checkpoint in old:
                remove_integrated(self.root, str(checkpoint.name), self.inputs)
        mine = [file for checkpoint in old for file in checkpoint.files[share]]
        raise_if_any_failed(world, capture_error(_remove, mine), NOT_LET_GO)
        if is_leader:
            for checkpoint in old:
                capture_error(
                    _remove, [checkpoint.state_path, in_progress_marker(self.root, checkpoint.name)]
                )
        return tuple(checkpoint.name for checkpoint in old)

    def _expired(self, world: World) -> list[Published]:
        """The checkpoints that are to go, by what all disks have; none that is an input of one."""
        found: list[list[tuple[Published, bool]]] = self.filesystems.on_each(
            world, NOT_LET_GO, self._known
        )
        known = {c.name: replace(c, root=self.root) for disk in found for c, _ in disk}
        inputs = {c.name for disk in found for c, is_input in disk if is_input}
        in_order = sorted(known.values(), key=lambda checkpoint: checkpoint.sequence)
        return [c for c in self._superseded(in_order) if c.name not in inputs]

    def _known(self) -> list[tuple[Published, bool]]:
        """Those of this run that this disk has, and whether they are inputs of the run."""
        mine = (c for c in published(self.root) if self.is_own(c.name))
        return [(checkpoint.in_short(), self._is_input(checkpoint)) for checkpoint in mine]

    def _unpublish(self, old: Sequence[Published], world: World) -> None:
        if self.filesystems.is_leader(world):
            there = (checkpoint for checkpoint in old if checkpoint.manifest_path.exists())
            unpublish(self.root, [checkpoint.name.record for checkpoint in there])

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


def _save_together(
    world: World, fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
) -> list[Result]:
    """One phase of a save on all ranks. Raises `UserError` on every rank when one fails."""
    return raise_if_any_failed(
        world, capture_error(fn, *args, **kwargs), NOT_SAVED,
        rule="every rank's file must be written",
        advice="Earlier checkpoints are untouched. {}, then resume with resume_training: True",
    )  # fmt: skip


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
