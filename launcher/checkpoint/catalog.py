"""The catalog of a folder of checkpoints: which saves exist, and which of their files are valid.

Owns the rules that one process can check on its disk: a save exists when its manifest is complete
and matches its file name; a save that left an in-progress marker and no manifest is unfinished; a
rank file is valid when it has the size, header and checksums of its manifest. Nothing is written,
and no other rank is asked (`folder` and `validation` do that).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import TEMPORARY_SUFFIX, temporary
from launcher.checkpoint.integrated import integrated_names
from launcher.checkpoint.names import FORMATS, SaveName, parse_rank_file, rank_file_paths
from launcher.weights.ranks.manifests import (
    DISKS,
    EVALUATION,
    MANIFEST_FOLDER,
    STATE_FOLDER,
    read_manifest,
)
from launcher.weights.reading.checksums import file_faults


@dataclass(frozen=True)
class RankFile:
    """A rank file, with its size and header checksum where a manifest has them."""

    path: Path
    nbytes: int | None = None
    header_digest: str | None = None

    def faults(self, *, data: bool) -> list[str]:
        """What is wrong with the file; `data` False skips the checksums after the header."""
        if not self.path.is_file():
            return [f"{self.path} is missing"]
        found = self.path.stat().st_size
        if self.nbytes is not None and found != self.nbytes:
            return [f"{self.path} has {found} bytes instead of {self.nbytes}"]
        return file_faults(self.path, header_digest=self.header_digest, data=data)


@dataclass(frozen=True)
class Published:
    """A save that exists: its folder, name and manifest."""

    root: Path
    name: SaveName
    manifest: dict[str, Any]

    @property
    def sequence(self) -> int:
        """Order of publication in its folder, from 1; the highest is the newest."""
        return int(self.manifest["sequence"])

    @property
    def saved_at(self) -> float:
        """Time of publication, seconds since 1970; 0 in manifests of older versions."""
        return float(self.manifest.get("saved_at", 0))

    @property
    def is_spread(self) -> bool:
        """Whether its files are on several file systems, each with those of some ranks."""
        return len(self.manifest.get(DISKS, ())) > 1

    @property
    def files(self) -> list[Path]:
        """Rank files, in rank order. From the name, so that a manifest cannot point elsewhere."""
        ranks = range(len(self.manifest["files"]))
        return [self.root / f"rank_{rank}" / self.name.rank_file(rank) for rank in ranks]

    @property
    def rank_files(self) -> list[RankFile]:
        """Rank files, with what the manifest records of them."""
        return [
            RankFile(path, record["bytes"], record.get("header_xxh3_64"))
            for path, record in zip(self.files, self.manifest["files"], strict=True)
        ]

    def without_files(self) -> Published:
        """The same without the manifest's records of files, to send to other ranks."""
        files = [None] * len(self.manifest["files"])
        short = {"sequence": self.sequence, "saved_at": self.saved_at, "files": files,
                 EVALUATION: self.manifest.get(EVALUATION)}  # fmt: skip
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
    """All saves of the folder that exist, oldest first."""
    found = (_read_manifest(root, path) for path in (root / MANIFEST_FOLDER).glob("*.json"))
    saves = [save for save in found if save is not None]
    return sorted(saves, key=lambda save: save.sequence)


def _read_manifest(root: Path, path: Path) -> Published | None:
    """The save that a manifest publishes; None when it is damaged or does not match its name."""
    manifest = read_manifest(path) or {}
    try:
        name = SaveName(**manifest["save"])
        sizes = [int(file["bytes"]) for file in manifest["files"]]
        is_valid = len(sizes) == manifest["world_size"] and int(manifest["sequence"]) > 0
        is_valid = is_valid and name.format in FORMATS
    except (KeyError, TypeError, ValueError):
        return None
    return Published(root, name, manifest) if is_valid and name.record == path.name else None


def damaged_manifests(root: Path, valid: Collection[str]) -> list[Path]:
    """Manifests in `root` that are not among the `valid` records."""
    found = (root / MANIFEST_FOLDER).glob("*.json")
    return sorted(path for path in found if path.name not in valid)


def in_progress_marker(root: Path, name: SaveName) -> Path:
    """The file that exists while a save is written; it becomes the manifest."""
    return temporary(root / MANIFEST_FOLDER / name.record)


def in_progress(root: Path) -> list[str]:
    """Records (names of manifests) of the saves with an in-progress marker."""
    markers = sorted((root / MANIFEST_FOLDER).glob(f".*.json{TEMPORARY_SUFFIX}"))
    return [path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX) for path in markers]


def unfinished(root: Path) -> list[str]:
    """Records of the saves that were never finished: they have a marker and no manifest."""
    return [
        record for record in in_progress(root) if not (root / MANIFEST_FOLDER / record).exists()
    ]


def is_unfinished(root: Path, begun: Collection[str] = ()) -> bool:
    """Whether all rank files in `root` belong to saves that were never finished, here or, by their
    records in `begun`, on another file system."""
    records = {*in_progress(root), *begun}
    files = (path.name for path in rank_file_paths(root))
    return all(record_of(name) in records for name in files)


def record_of(file_name: str) -> str:
    """The record of the save that a rank file belongs to; empty for other files."""
    parsed = parse_rank_file(file_name)
    return parsed[0].record if parsed else ""


def next_counter(root: Path, prefix: str) -> int:
    """The counter of a new run in `root`: 0 in a folder without this prefix, else one more than the
    highest; never one whose manifests would have the names of another prefix."""
    names = {file.name for file in rank_file_paths(root)}
    parsed = [found[0] for name in names if (found := parse_rank_file(name)) is not None]
    parsed += [save.name for save in published(root)]
    counter = max((name.counter + 1 for name in parsed if name.prefix == prefix), default=0)
    labels = {name.label for name in parsed}
    labels |= {name.rpartition("-")[0] for name in integrated_names(root)}
    while SaveName(prefix, counter, 1, 1).label in labels:
        counter += 1
    return counter
