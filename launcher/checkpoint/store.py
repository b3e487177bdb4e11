"""The store: a folder of checkpoints. Saves commit all ranks or nothing; old ones are let go.

    checkpoint/rank_0/CKP_rank_0-1_10.safetensors      1. every rank writes aside, then renames
    checkpoint/state/CKP-1_10.json                     2. rank 0, after all ranks are done
    checkpoint/manifest/CKP-1_10.json                  3. rank 0, last: now the checkpoint exists
    checkpoint/rank_0/meta.json                        4. every rank, for readers of the original

Invariants: a checkpoint counts only with its manifest; a manifest appears only after every file it
names is durable; the oldest checkpoint is deleted only after the newer one is published, its
manifest first. Nothing is deleted that this launcher did not write.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.agreement import agree, attempt
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
from launcher.checkpoint.published import Published, intent, published
from launcher.checkpoint.space import bytes_on_host, room_for
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.parallel.world import World
from launcher.weights.formats.note import Inventory
from launcher.weights.ranks.manifests import MANIFEST_FOLDER, STATE_FOLDER, digest_of, sealed
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
class Store:
    """One run's view of a folder of checkpoints."""

    root: Path
    prefix: str
    counter: int
    keep_max: int
    """How many checkpoints of this prefix stay; 0: all, or what `keep_minutes` says."""
    inputs: frozenset[Path] = frozenset()
    """Resolved files and folders that are never deleted: what the run was started from."""
    inventory: Inventory | None = None
    """Of what all ranks together save here."""
    keep_minutes: int = 0
    """With `keep_max` 0: of those saved in so many minutes one stays, and the newest; 0: all."""

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
        try:
            agree(world, attempt(self._prepare, name, world, nbytes))
            outcome = attempt(self._write, name, shards, mesh, world, remove_redundancy)
            files = agree(world, outcome)
            agree(world, attempt(self._publish, name, files, state, mesh, world))
        except UserError:
            self._abandon(name, world)
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
        mine = [c for c in world.from_main(published(self.root)) if c.name.prefix == self.prefix]
        if mine:
            agree(world, attempt(self._write_meta, mine[-1].name, world), NO_META)
            self._retain(world)

    def _abandon(self, name: SaveName, world: World) -> None:
        """Remove what a save left that failed; a published one stays."""
        if world.from_main((self.root / MANIFEST_FOLDER / name.record).exists()):
            return
        path = self.root / f"rank_{world.rank}" / name.rank_file(world.rank)
        left = [path, temporary(path)]
        world.barrier()  # files first, then what says whose they are
        attempt(_remove, left)
        world.barrier()
        if world.is_main:
            state = self.root / STATE_FOLDER / name.record
            attempt(_remove, [state, temporary(state), intent(self.root, name)])

    def _prepare(self, name: SaveName, world: World, bytes_here: int) -> None:
        (self.root / f"rank_{world.rank}").mkdir(parents=True, exist_ok=True)
        room_for(self.root, bytes_here)
        if world.is_main:
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

    def _publish(
        self,
        name: SaveName,
        files: list[dict[str, Any]],
        state: dict[str, Any],
        mesh: Mesh,
        world: World,
    ) -> None:
        if not world.is_main:
            return
        newest = max((checkpoint.sequence for checkpoint in published(self.root)), default=0)
        if not intent(self.root, name).exists():
            raise OSError(
                errno.EBUSY, "another run that writes here cleared this save away", str(self.root)
            )
        state_text = json_bytes(state)
        manifest = {
            "sequence": newest + 1,
            "saved_at": round(time.time(), 3),
            "save": vars(name),
            "global_step": state["global_step"],
            "world_size": mesh.world_size,
            "mesh": mesh.sizes(),
            "files": files,
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
        known = [c for c in published(self.root) if c.name.prefix == self.prefix]
        old = [c for c in self._superseded(known) if not self._is_input(c)]
        old = world.from_main(old)
        # What is let go is first made a save that was never finished: a crash leaves one of those,
        # which the next start clears away.
        agree(world, attempt(self._withdraw, old, world), NOT_LET_GO)
        if world.is_main:
            for checkpoint in old:
                remove_integrated(self.root, str(checkpoint.name), self.inputs)
        mine = [file for checkpoint in old for file in checkpoint.files[world.rank :: world.size]]
        agree(world, attempt(_remove, mine), NOT_LET_GO)
        if world.is_main:
            for checkpoint in old:
                attempt(_remove, [checkpoint.state_path, intent(self.root, checkpoint.name)])
        return tuple(checkpoint.name for checkpoint in old)

    def _withdraw(self, old: Sequence[Published], world: World) -> None:
        if world.is_main and old:
            for checkpoint in old:
                os.replace(checkpoint.manifest_path, intent(self.root, checkpoint.name))
            sync_directory(self.root / MANIFEST_FOLDER)

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
