"""Rank folders: the saves in `rank_0/`, `rank_1/`, ..., by file names alone.

Owns which files belong together, and which save is the newest, with manifests and without. Files of
one save have the same name except for the rank; names without a rank are accepted too:

    rank_0/CKP_rank_0-1_10.safetensors    rank_1/CKP_rank_1-1_10.safetensors    the save CKP-1_10

Torch-free; no file of weights is opened. Invariant: the newest save is determined by numbers in
names or manifests, never by time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.weights.complete import WEIGHT_SUFFIXES, listed
from launcher.weights.ranks.manifests import MANIFEST_FOLDER, read_manifest
from launcher.weights.source import rank_of

_NUMBERS = re.compile(r"-(\d+)_(\d+)$")
RANK_SUFFIXES = (".safetensors", ".ckpt")
"""Extensions of rank files, the preferred format first."""
SHOWN = 4
"""Saves named in a message."""


@dataclass(frozen=True)
class Save:
    """One save: the file of each rank that has one."""

    label: str
    """The name of its files without the rank: `CKP-1_10`, for a second run `CKP_1-1_10`."""
    run: int
    """Number of the run among those that wrote into the folder under one name, from 0."""
    files: Mapping[int, Path]

    @property
    def order(self) -> tuple[int, int, int]:
        """(run, epoch, step): the greatest is the newest."""
        numbers = _NUMBERS.search(self.label)
        return (self.run, int(numbers[1]), int(numbers[2])) if numbers else (self.run, 0, 0)

    @property
    def in_rank_order(self) -> list[Path]:
        """Its files."""
        return [self.files[rank] for rank in sorted(self.files)]


def rank_folders(root: Path) -> dict[int, Path]:
    """Rank to its folder in `root`."""
    found: dict[int, Path] = {}
    for child in listed(root):
        rank = rank_of(child)
        if rank is None or not child.is_dir():
            continue
        if rank in found:
            raise UserError(
                f"{root} holds {found[rank].name}/ and {child.name}/",
                rule="a rank has one folder",
                advice="Move one of them into another folder",
            )
        found[rank] = child
    return dict(sorted(found.items()))


def saves(root: Path) -> list[Save]:
    """The saves of `root`, oldest first. Of each rank folder the files of one format count:
    safetensors where there are any."""
    files = {rank: weight_files(folder) for rank, folder in rank_folders(root).items()}
    by_label: dict[tuple[int, str], dict[int, Path]] = {}
    for rank, own in files.items():
        for file in own:
            label, run = _label(file, rank)
            by_label.setdefault((run, label), {})[rank] = file
    found = [Save(label, run, by_rank) for (run, label), by_rank in by_label.items()]
    numbered = _numbered(files) if len(found) > 1 else None
    return [numbered] if numbered else sorted(found, key=lambda save: (save.order, save.label))


def _numbered(files: Mapping[int, Sequence[Path]]) -> Save | None:
    """The save of files whose names end in just the rank, one in each folder: `rank_1/toy1`, as
    transform_checkpoints of MindSpore names them; None for others."""
    if any(len(own) != 1 for own in files.values()):
        return None
    names = {rank: re.fullmatch(rf"(.*\D)?{rank}", own[0].stem) for rank, own in files.items()}
    stems = {match[1] if match else None for match in names.values()}
    stem = stems.pop() if len(stems) == 1 else None
    return Save(stem.rstrip("_-"), 0, {rank: own[0] for rank, own in files.items()}) if stem else (
        None)  # fmt: skip


def newest(root: Path) -> Save:
    """The newest save of `root`. Raises `UserError` when there is none, or when names are
    ambiguous."""
    found = saves(root)
    if not found:
        raise UserError(
            f"{root} has rank folders without weights",
            rule="each holds the file of its rank (*.safetensors)",
            advice="Give the folder that holds them, usually {output_dir}/checkpoint",
        )
    last = [save for save in found if save.order == found[-1].order]
    if len(last) > 1:
        raise UserError(
            f"{root} holds {len(last)} saves: {', '.join(save.label for save in last[:SHOWN])}",
            rule="their names do not show which is the newest",
            nearest=f"One of them is {last[0].in_rank_order[0]}",
            advice="Name a file of the one you want",
        )
    return last[0]


def save_of(file: Path) -> Save:
    """The save that a rank file belongs to."""
    rank = rank_of(file.parent)
    if rank is None:
        raise UserError(
            f"{file} is not in a rank folder",
            rule="distributed weights lie in rank_0/, rank_1/, ...",
            advice="Give the folder that holds them, usually {output_dir}/checkpoint",
        )
    for save in saves(file.parent.parent):
        if file in save.files.values():
            return save
    label, run = _label(file, rank)
    return Save(label, run, {rank: file})


def label_of(file: Path) -> str:
    """The name of the save a rank file belongs to: `CKP_1-2_5` of `rank_3/CKP_rank_3_1-2_5`."""
    rank = rank_of(file.parent)
    return file.stem if rank is None else _label(file, rank)[0]


def newest_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest with the highest sequence number in `root`; None without one."""
    best: dict[str, Any] | None = None
    for path in sorted((root / MANIFEST_FOLDER).glob("*.json")):
        try:
            content = read_manifest(path) or {}
            is_complete = int(content["sequence"]) > 0 and content["world_size"] == len(
                content["files"]
            )
        except (ValueError, KeyError, TypeError):
            continue
        if is_complete and (best is None or content["sequence"] > best["sequence"]):
            best = content
    return best


def first_file(path: Path) -> Path | None:
    """A file of the newest save at `path`, a folder or a rank file; None where there is none, or
    names are ambiguous."""
    if path.is_file():
        return path
    manifest = newest_manifest(path)
    files = [path / folder / name for folder, name in _places(manifest or {})]
    try:
        return (
            next((file for file in files if file.is_file()), None)
            or (newest(path).in_rank_order[0])
        )
    except UserError:
        return None


def _places(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(rank folder, file name) of the files in a manifest that are in rank folders."""
    found = (re.fullmatch(r"(rank_\d+)/([^/]+)", str(r)) for r in _names(manifest))
    return [(match[1], match[2]) for match in found if match]


def _names(manifest: Mapping[str, Any]) -> list[Any]:
    return [r.get("file") if isinstance(r, dict) else None for r in manifest.get("files", [])]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a rank folder: safetensors, and `.ckpt` files without a twin of them;
    else those of the first format that there are any of."""
    files = [child for child in listed(folder) if not child.name.startswith(".")]
    by_suffix = {
        suffix: [file for file in files if file.name.endswith(suffix) and file.is_file()]
        for suffix in WEIGHT_SUFFIXES
    }
    ours, theirs = (by_suffix[suffix] for suffix in RANK_SUFFIXES)
    if ours:
        twins = {file.stem for file in ours}
        return sorted([*ours, *(file for file in theirs if file.stem not in twins)])
    return next(filter(None, by_suffix.values()), [])


def _label(file: Path, rank: int) -> tuple[str, int]:
    """(name of the save, run) of a rank's file."""
    match = re.fullmatch(rf"(.*)(?:^|_)rank_?{rank}(?:_(\d+)(?=-))?(?!\d)(.*)", file.stem)
    if match is None:
        return file.stem, 0
    run = int(match[2] or 0)
    return f"{match[1]}{f'_{run}' if run else ''}{match[3]}", run
