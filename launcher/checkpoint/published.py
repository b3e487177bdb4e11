"""Published checkpoints: those that count, because their manifest is whole.

Owns what a manifest says of a checkpoint, where its files lie, and how it ceases to count.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import sync_directory, temporary
from launcher.checkpoint.names import SaveName
from launcher.weights.ranks.manifests import (
    DISKS,
    MANIFEST_FOLDER,
    STATE_FOLDER,
    read_manifest,
)


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
    def is_spread(self) -> bool:
        """Whether it was saved on several disks, each of which has the files of some ranks."""
        return len(self.manifest.get(DISKS, ())) > 1

    @property
    def files(self) -> list[Path]:
        """Rank files, in rank order. From the name, so that a manifest cannot point elsewhere."""
        ranks = range(len(self.manifest["files"]))
        return [self.root / f"rank_{rank}" / self.name.rank_file(rank) for rank in ranks]

    def in_short(self) -> Published:
        """The same without what its manifest says of files, to be told to other ranks."""
        files = [None] * len(self.manifest["files"])
        short = {"sequence": self.sequence, "saved_at": self.saved_at, "files": files}
        return replace(self, manifest=short)

    @property
    def manifest_path(self) -> Path:
        """The file whose existence makes this a checkpoint."""
        return self.root / MANIFEST_FOLDER / self.name.record

    @property
    def state_path(self) -> Path:
        """Global state of the run."""
        return self.root / STATE_FOLDER / self.name.record


def published(root: Path) -> list[Published]:
    """Every checkpoint of the folder that counts, oldest first."""
    found = []
    for path in (root / MANIFEST_FOLDER).glob("*.json"):
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


def in_progress_marker(root: Path, name: SaveName) -> Path:
    """The file that stands while a save is being written; it becomes the manifest."""
    return temporary(root / MANIFEST_FOLDER / name.record)


def unpublish(root: Path, records: Sequence[str]) -> None:
    """Make of published saves such as were never finished; `records`: the names of manifests."""
    for record in records:
        manifest = root / MANIFEST_FOLDER / record
        os.replace(manifest, temporary(manifest))
    if records:
        sync_directory(root / MANIFEST_FOLDER)
