"""One save in one folder, by all ranks or not at all: prepare, write, publish.

    prepare   every rank    folders, room on the disk; leaders: the in-progress marker
    write     every rank    rank_0/CKP_rank_0-1_10.safetensors, to a temporary file, then renamed
    publish   leaders       state/CKP-1_10.json, then manifest/CKP-1_10.json, which replaces the
                            marker: from now on the checkpoint exists

Where ranks have several file systems, each gets the files of its ranks, and the same state and
manifest from its leader. Invariants: a manifest is written only after every file that it lists is
durable; after an error on any rank, all of them remove what they wrote.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.catalog import in_progress_marker, published
from launcher.checkpoint.cleanup import remove_files, unpublish
from launcher.checkpoint.files import (
    json_bytes,
    publish,
    sync_directory,
    temporary,
    write_bytes,
)
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.space import bytes_on_host, room_for
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import P, Result, capture_error, raise_if_any_failed
from launcher.parallel.filesystems import FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import Inventory
from launcher.weights.ranks.manifests import (
    DISKS,
    EVALUATION,
    MANIFEST_FOLDER,
    STATE_FOLDER,
    digest_of,
    sealed,
)
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.checksums import file_faults

NOT_SAVED = "the checkpoint could not be saved"


@dataclass(frozen=True)
class ManifestInputs:
    """What one file system, and rank 0 for all, contributes to the manifest."""

    newest: int
    """The highest sequence number in its folder."""
    saved_at: float
    state: dict[str, Any]
    """Of rank 0."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One save on its way into the folder `root`."""

    root: Path
    filesystems: FilesystemGroups
    inventory: Inventory | None
    name: SaveName
    mesh: Mesh
    world: World
    remove_redundancy: bool
    """Recorded in the rank files: replicas of tensors were left to other ranks."""

    def run(self, shards: Mapping[str, Shard], state: dict[str, Any]) -> int:
        """Write and publish the save. Returns the bytes of all rank files.

        Called by all ranks together. Raises `UserError` on every rank when any rank fails.
        """
        is_leader = self.filesystems.is_leader(self.world)
        nbytes = bytes_on_host(self.world, sum(shard.tensor.nbytes for shard in shards.values()))
        is_prepared = False
        try:
            self._on_ranks(True, self._prepare, nbytes)
            is_prepared = True
            files = self._on_ranks(True, self._write, shards)
            inputs = self._on_ranks(is_leader, self._manifest_inputs, state)
            self._on_ranks(is_leader, self._publish, files, inputs)
        except UserError:
            self._abandon(is_prepared)
            raise
        return sum(record["bytes"] for record in files)

    def _on_ranks(
        self, works: bool, fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """One phase, on the ranks with `works`. Raises `UserError` on every rank when one fails."""
        return raise_if_any_failed(
            self.world, capture_error(fn, *args, **kwargs) if works else None, NOT_SAVED,
            rule="every rank's file must be written",
            advice="Earlier checkpoints are untouched. {}, then resume with resume_training: True",
        )  # fmt: skip

    def _prepare(self, bytes_on_this_host: int) -> None:
        self._rank_file.parent.mkdir(parents=True, exist_ok=True)
        room_for(self.root, bytes_on_this_host)
        if self.filesystems.is_leader(self.world):
            for folder in (MANIFEST_FOLDER, STATE_FOLDER):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            if self._manifest.exists():
                raise FileExistsError(errno.EEXIST, "it is published", str(self._manifest))
            # Marks the files of this save, in case it is never finished.
            self._marker.touch()
            sync_directory(self.root / MANIFEST_FOLDER)

    def _write(self, shards: Mapping[str, Shard]) -> dict[str, Any]:
        """Write the file of this rank. Returns its record for the manifest."""
        path, rank = self._rank_file, self.world.rank
        try:
            header = write_rank_file(
                temporary(path), shards, mesh=self.mesh, rank=rank,
                remove_redundancy=self.remove_redundancy, inventory=self.inventory,
                file_format=self.name.format,
            )  # fmt: skip
        except BaseException:
            temporary(path).unlink(missing_ok=True)
            raise
        publish(temporary(path), path)
        faults = file_faults(path, header_digest=header.digest, data=False)
        if faults:
            raise OSError(errno.EIO, faults[0], str(path))
        return {
            "rank": rank,
            "file": str(path.relative_to(self.root)),
            "bytes": header.file_bytes,
            "header_xxh3_64": header.digest,
        }

    def _manifest_inputs(self, state: dict[str, Any]) -> ManifestInputs:
        newest = max((save.sequence for save in published(self.root)), default=0)
        return ManifestInputs(newest, round(time.time(), 3), state if self.world.is_main else {})

    def _publish(self, files: list[dict[str, Any]], inputs: Sequence[ManifestInputs]) -> None:
        """Write state and manifest; `inputs` of all file systems, that of rank 0 first."""
        if not self._marker.exists():
            raise OSError(
                errno.EBUSY, "another run in this folder removed this save", str(self.root)
            )
        state_text = json_bytes(inputs[0].state)
        evaluation = inputs[0].state.get(EVALUATION)
        manifest = {
            "sequence": max(one.newest for one in inputs) + 1,
            "saved_at": inputs[0].saved_at,
            "save": self.name.as_json(),
            "global_step": inputs[0].state["global_step"],
            "world_size": self.mesh.world_size,
            "mesh": self.mesh.sizes(),
            "files": files,
            **({EVALUATION: evaluation} if evaluation is not None else {}),
            **({DISKS: self.filesystems.groups} if self.filesystems.are_several else {}),
            "state_xxh3_64": digest_of(state_text),
        }
        write_bytes(self._state, state_text)
        write_bytes(self._manifest, sealed(manifest))

    def _abandon(self, is_prepared: bool) -> None:
        """Remove the files of a failed save; one that every file system has published stays.

        `is_prepared`: no file system had a manifest of this name before.
        """
        is_leader = self.filesystems.is_leader(self.world)
        is_published = self._manifest.exists() if is_leader else None
        gathered = self.world.gather(is_published)
        published_on = [found for found in gathered if found is not None]
        if all(published_on):
            return
        if any(published_on) and not is_prepared:
            if is_leader and not is_published:
                capture_error(remove_files, [self._marker])
            return
        if is_published:
            capture_error(unpublish, self.root, [self.name.record])
        self.world.barrier()  # files first, then the marker that names their owner
        capture_error(remove_files, [self._rank_file, temporary(self._rank_file)])
        self.world.barrier()
        if is_leader:
            capture_error(remove_files, [self._state, temporary(self._state), self._marker])

    @property
    def _rank_file(self) -> Path:
        rank = self.world.rank
        return self.root / f"rank_{rank}" / self.name.rank_file(rank)

    @property
    def _manifest(self) -> Path:
        return self.root / MANIFEST_FOLDER / self.name.record

    @property
    def _marker(self) -> Path:
        return in_progress_marker(self.root, self.name)

    @property
    def _state(self) -> Path:
        return self.root / STATE_FOLDER / self.name.record
