"""The store: one run's part of a folder of checkpoints. Saves are committed, old ones removed.

    checkpoint/rank_0/CKP_rank_0-1_10.safetensors      1. `commit`: rank files,
    checkpoint/state/CKP-1_10.json                        the state of the run,
    checkpoint/manifest/CKP-1_10.json                     the manifest
    checkpoint/best.json                               2. with keep_best: the name of the best save
    checkpoint/rank_0/meta.json                        3. every rank, for readers of MindFormers
    older saves                                        4. removed, their manifests first

Invariants: a save is removed only after a newer one is published; only saves of this run, or of the
run it resumes, are removed, and never an input of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checkpoint.best import BestRule, publish_best, withdraw_best
from launcher.checkpoint.catalog import Published, in_progress_marker, published
from launcher.checkpoint.cleanup import remove_files, unpublish
from launcher.checkpoint.commit import Commit
from launcher.checkpoint.files import write_json
from launcher.checkpoint.integrated import remove_integrated
from launcher.checkpoint.names import DEFAULT_FORMAT, SaveName
from launcher.checkpoint.retention import superseded
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import Inventory

NO_META = "meta.json was not written"
NO_BEST = "best.json was not written"
NOT_REMOVED = "older checkpoints were not removed"


@dataclass(frozen=True)
class Saved:
    """The result of a save: bytes written by all ranks, and the checkpoints that were removed."""

    bytes_written: int
    removed: tuple[SaveName, ...]
    best: SaveName | None = None
    """With `keep_best`, the best save of the run now."""
    warning: str = ""
    """What failed after it was published; older ones stay then."""


@dataclass(frozen=True)
class Store:
    """One run's part of a folder of checkpoints."""

    root: Path
    prefix: str
    counter: int
    keep_max: int
    """How many checkpoints of this run stay; 0: by `keep_minutes`."""
    inputs: frozenset[Path] = frozenset()
    """Resolved files and folders that are never deleted: those the run was started from."""
    inventory: Inventory | None = None
    """Of what all ranks together save here."""
    keep_minutes: int = 0
    """With `keep_max` 0: one checkpoint stays for so many minutes, and the newest; 0: all."""
    filesystems: FilesystemGroups = ONE_FILESYSTEM
    """The ranks that share the folder `root`."""
    file_format: str = DEFAULT_FORMAT
    """Of the rank files."""
    best: BestRule | None = None
    """The best save by this rule is not removed, and `best.json` names it."""
    resumed_label: str = ""
    """The run that this one resumes under another name: its saves count for retention."""

    @property
    def label(self) -> str:
        """Prefix and counter, which identify this run in the folder."""
        return SaveName(self.prefix, self.counter, 1, 1).label

    def is_own(self, name: SaveName) -> bool:
        """Whether this run may delete a save: its own, or one of the run that it resumes."""
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
        """Write and publish one checkpoint, then remove old ones. Called by all ranks together.

        `remove_redundancy`: `shards` lack replicas that other ranks save. Raises `UserError` on
        every rank when any rank could not write; then earlier checkpoints are untouched, and the
        files of this one are removed.
        """
        commit = Commit(
            root=self.root, filesystems=self.filesystems, inventory=self.inventory, name=name,
            mesh=mesh, world=world, remove_redundancy=remove_redundancy,
        )  # fmt: skip
        nbytes = commit.run(shards, state)
        try:
            best = self.publish_best(world)
            return Saved(nbytes, self._finish(name, world), best)
        except UserError as error:
            return Saved(nbytes, (), warning=error.problems[0].what)

    def finish_interrupted_save(self, world: World) -> None:
        """Do what was left to do after the newest save was published. Called by all ranks together.

        Raises `UserError`.
        """
        own = [save for save in world.from_main(published(self.root)) if self.is_own(save.name)]
        if own:
            self.publish_best(world)
            self._finish(own[-1].name, world)

    def publish_best(self, world: World) -> SaveName | None:
        """Make `best.json` name the best save of this run, which is returned. Called by all ranks
        together. Raises `UserError` on every rank."""
        if self.best is None:
            return None
        return self.filesystems.on_each(world, NO_BEST, self._publish_best)[0]

    def _publish_best(self) -> SaveName | None:
        assert self.best is not None
        own = [save for save in published(self.root) if self.is_own(save.name)]
        best = publish_best(self.root, self.best, own)
        return best.name if best is not None else None

    def _finish(self, name: SaveName, world: World) -> tuple[SaveName, ...]:
        """Write meta.json and remove old saves. Returns those that were removed."""
        raise_if_any_failed(world, capture_error(self._write_meta, name, world.rank), NO_META)
        return self._remove_old(world)

    def _write_meta(self, name: SaveName, rank: int) -> None:
        folder = self.root / f"rank_{rank}"
        if not (folder / name.rank_file(rank)).is_file():
            return  # a save of fewer ranks
        meta = {
            "last_epoch": name.epoch,
            "last_step": name.step,
            "last_ckpt_file": name.rank_file(rank),
        }
        write_json(folder / "meta.json", meta, durable=False)

    def _remove_old(self, world: World) -> tuple[SaveName, ...]:
        """Remove the expired saves. They are unpublished first, so that a crash leaves unfinished
        saves, which the next start removes."""
        old = self._expired(world)
        is_leader, share = self.filesystems.is_leader(world), self.filesystems.share(world)
        self.filesystems.on_each(world, NOT_REMOVED, self._unpublish, old)
        if is_leader:
            for save in old:
                remove_integrated(self.root, str(save.name), self.inputs)
        files = [file for save in old for file in save.files[share]]
        raise_if_any_failed(world, capture_error(remove_files, files), NOT_REMOVED)
        if is_leader:
            for save in old:
                marker = in_progress_marker(self.root, save.name)
                capture_error(remove_files, [save.state_path, marker])
        return tuple(save.name for save in old)

    def _expired(self, world: World) -> list[Published]:
        """The saves to remove, from those on all file systems; none that is an input on one."""
        found = self.filesystems.on_each(world, NOT_REMOVED, self._own_saves)
        known = {s.name: replace(s, root=self.root) for saves in found for s, _ in saves}
        inputs = {save.name for saves in found for save, is_input in saves if is_input}
        in_order = sorted(known.values(), key=lambda save: save.sequence)
        old = superseded(in_order, self.keep_max, self.keep_minutes)
        best = self.best.best(in_order) if self.best is not None else None
        return [save for save in old if save.name not in inputs and save is not best]

    def _own_saves(self) -> list[tuple[Published, bool]]:
        """The saves of this run on this file system, and whether they are inputs of the run."""
        return [
            (save.without_files(), any(file.resolve() in self.inputs for file in save.files))
            for save in published(self.root)
            if self.is_own(save.name)
        ]

    def _unpublish(self, old: Sequence[Published]) -> None:
        withdraw_best(self.root, [str(save.name) for save in old])
        unpublish(self.root, [save.name.record for save in old if save.manifest_path.exists()])
