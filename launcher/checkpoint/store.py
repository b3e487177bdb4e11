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

from launcher.checkpoint.files import (
    TEMPORARY_SUFFIX,
    json_bytes,
    publish,
    sync_directory,
    temporary,
    write_bytes,
    write_json,
)
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.space import bytes_on_host, room_for
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.parallel.world import World
from launcher.weights.formats.note import Inventory
from launcher.weights.ranks.manifests import digest_of, read_manifest, sealed
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.checksums import file_faults
from launcher.weights.reading.memory import Shard


@dataclass(frozen=True)
class Published:
    """A checkpoint that counts: its folder, name and manifest."""

    root: Path
    name: SaveName
    manifest: dict[str, Any]

    @property
    def sequence(self) -> int:
        """Order of publication in its folder, from 1; the highest is the newest."""
        return int(self.manifest["sequence"])

    @property
    def saved_at(self) -> float:
        """When it was published, seconds since 1970; 0 in those of older versions."""
        return float(self.manifest.get("saved_at", 0))

    @property
    def files(self) -> list[Path]:
        """Rank files, in rank order. From the name, so that a manifest cannot point elsewhere."""
        ranks = range(len(self.manifest["files"]))
        return [self.root / f"rank_{rank}" / self.name.rank_file(rank) for rank in ranks]

    @property
    def manifest_path(self) -> Path:
        """The file whose existence makes this a checkpoint."""
        return self.root / "manifest" / self.name.record

    @property
    def state_path(self) -> Path:
        """Global state of the run."""
        return self.root / "state" / self.name.record


def published(root: Path) -> list[Published]:
    """Every checkpoint of the folder that counts, oldest first."""
    found = []
    for path in (root / "manifest").glob("*.json"):
        checkpoint = _read_manifest(root, path)
        if checkpoint is not None:
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.sequence)


def _read_manifest(root: Path, path: Path) -> Published | None:
    """The checkpoint a manifest publishes; None when it is damaged or not what its name says."""
    manifest = read_manifest(path) or {}
    try:
        name = SaveName(**manifest["save"])
        sizes = [int(file["bytes"]) for file in manifest["files"]]
        whole = len(sizes) == manifest["world_size"] and int(manifest["sequence"]) > 0
    except (KeyError, TypeError, ValueError):
        return None
    return Published(root, name, manifest) if whole and name.record == path.name else None


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
    """Resolved files that are never deleted: what the run was started from."""
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
            agree(world, attempt(self._finish, name, files[world.rank], world))
            return Saved(nbytes, self._retain(world))
        except UserError as error:
            return Saved(nbytes, (), error.problems[0].what)

    def settle(self, world: World) -> None:
        """Do what the newest save did not come to after it was published. Called on every rank.

        Raises `UserError`.
        """
        mine = [c for c in world.from_main(published(self.root)) if c.name.prefix == self.prefix]
        if mine:
            agree(world, attempt(self._write_meta, mine[-1].name, world))
            self._retain(world)

    def _abandon(self, name: SaveName, world: World) -> None:
        """Remove what a save left that failed; a published one stays."""
        if world.from_main((self.root / "manifest" / name.record).exists()):
            return
        path = self.root / f"rank_{world.rank}" / name.rank_file(world.rank)
        left = [path, temporary(path)]
        world.barrier()  # files first, then what says whose they are
        attempt(_remove, left)
        world.barrier()
        if world.is_main:
            state = self.root / "state" / name.record
            attempt(_remove, [state, temporary(state), intent(self.root, name)])

    def _prepare(self, name: SaveName, world: World, bytes_here: int) -> None:
        (self.root / f"rank_{world.rank}").mkdir(parents=True, exist_ok=True)
        room_for(self.root, bytes_here)
        if world.is_main:
            for folder in ("manifest", "state"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            published_already = self.root / "manifest" / name.record
            if published_already.exists():
                raise FileExistsError(errno.EEXIST, "it is published", str(published_already))
            # Says whose files these are, should this save never be finished.
            intent(self.root, name).touch()
            sync_directory(self.root / "manifest")

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
        write_bytes(self.root / "state" / name.record, state_text)
        write_bytes(self.root / "manifest" / name.record, sealed(manifest))

    def _is_input(self, checkpoint: Published) -> bool:
        return any(file.resolve() in self.inputs for file in checkpoint.files)

    def _finish(self, name: SaveName, record: dict[str, Any], world: World) -> None:
        """Look at the file once more, before older ones go, and write what the original reads."""
        path = self.root / f"rank_{world.rank}" / name.rank_file(world.rank)
        faults = file_faults(path, header_digest=record["header_xxh3_64"], data=False)
        if faults:
            raise OSError(errno.EIO, faults[0], str(path))
        self._write_meta(name, world)

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
        agree(world, attempt(self._withdraw, old, world))
        mine = [file for checkpoint in old for file in checkpoint.files[world.rank :: world.size]]
        agree(world, attempt(_remove, mine))
        if world.is_main:
            for checkpoint in old:
                attempt(_remove, [checkpoint.state_path, intent(self.root, checkpoint.name)])
        return tuple(checkpoint.name for checkpoint in old)

    def _withdraw(self, old: Sequence[Published], world: World) -> None:
        if world.is_main and old:
            for checkpoint in old:
                os.replace(checkpoint.manifest_path, intent(self.root, checkpoint.name))
            sync_directory(self.root / "manifest")

    def _superseded(self, mine: Sequence[Published]) -> list[Published]:
        """Those that are not to stay, of checkpoints in order; never the newest."""
        if self.keep_max:
            return list(mine[: -self.keep_max])
        if not self.keep_minutes:
            return []
        old, kept_at = [], -math.inf
        for checkpoint in mine[:-1]:
            if checkpoint.saved_at - kept_at < 60 * self.keep_minutes:
                old.append(checkpoint)
            else:
                kept_at = checkpoint.saved_at
        return old


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def intent(root: Path, name: SaveName) -> Path:
    """The file that stands while a save is being written; it becomes the manifest."""
    return temporary(root / "manifest" / name.record)


def attempt(action: Any, *arguments: Any) -> tuple[Any, str]:
    """(result, error text): a rank that fails must still meet the others."""
    try:
        return action(*arguments), ""
    except OSError as error:
        return None, f"{error.strerror} ({error.filename})"


def agree(world: World, outcome: tuple[Any, str]) -> list[Any]:
    """The results of all ranks, or a `UserError` on all when one failed."""
    outcomes = world.gather(outcome)
    failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if failed:
        raise UserError(
            f"the checkpoint could not be saved: {'; '.join(failed[:4])}",
            rule="every rank's file must be written",
            advice="Earlier checkpoints are untouched. Make room or mend the folder, then resume "
            "with resume_training: True",
        )
    return [result for result, _ in outcomes]


def next_counter(root: Path, prefix: str) -> int:
    """The run counter of a new run in `root`: 0 in a folder without this prefix, else one more
    than the highest there; never one whose manifests would bear the names of another prefix."""
    names = {file.name for file in root.glob("rank_*/*.safetensors")}
    parsed = [found[0] for name in names if (found := parse_rank_file(name)) is not None]
    parsed += [checkpoint.name for checkpoint in published(root)]
    counter = max((name.counter + 1 for name in parsed if name.prefix == prefix), default=0)
    labels = {name.label for name in parsed}
    while SaveName(prefix, counter, 1, 1).label in labels:
        counter += 1
    return counter


def clean_unfinished(root: Path) -> list[Path]:
    """Remove what saves left behind that were never finished. Returns what was removed.

    Only saves that left their intent: files that were put here otherwise stay.
    """
    removed = []
    for path in sorted((root / "manifest").glob(f".*.json{TEMPORARY_SUFFIX}")):
        record = path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX)
        if not (root / "manifest" / record).exists():
            removed += _files_of(root, record)
        removed.append(path)
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def _files_of(root: Path, record: str) -> list[Path]:
    """Rank and state files, finished or not, of the save with this record."""
    state = root / "state" / record
    found = [path for path in (state, temporary(state)) if path.exists()]
    for path in root.glob("rank_*/*.safetensors*"):
        found += [path] if _record_of(path.name) == record else []
    for path in root.glob(f"rank_*/.*.safetensors{TEMPORARY_SUFFIX}"):
        name = path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX)
        found += [path] if _record_of(name) == record else []
    return found


def _record_of(file_name: str) -> str:
    parsed = parse_rank_file(file_name)
    return parsed[0].record if parsed else ""


def is_unfinished(root: Path) -> bool:
    """Whether all weights in `root` belong to saves that were never finished."""
    intents = (root / "manifest").glob(f".*.json{TEMPORARY_SUFFIX}")
    records = {path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX) for path in intents}
    files = (path.name for path in root.glob("rank_*/*.safetensors"))
    return all(_record_of(name) in records for name in files)
