"""Listing: the saves in a folder of checkpoints, one row each, without reading the data.

Owns that row. A save is complete when the seal of its manifest is valid, its state is unchanged and
each rank file has the size and header digest of the manifest. Torch-free.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.layout.mesh import layout_text
from launcher.weights.formats import rank_header_of
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.manifests import (
    BEST_FILE,
    MANIFEST_FOLDER,
    STATE_FOLDER,
    ranks_elsewhere,
    read_manifest,
    state_fault,
    text_of_elsewhere,
)
from launcher.weights.ranks.rank_folders import Save, saves
from launcher.weights.reading.checksums import file_faults
from launcher.weights.source import Source, detect

_INTENT = ".json.tmp"
UNFINISHED = "unfinished: being written, or left by a crash (the next start removes it)"


@dataclass(frozen=True)
class Listed:
    """One save."""

    folder: Path
    name: str
    step: int | None
    """Optimizer steps done; None without a manifest."""
    nbytes: int
    """Of the rank files and the state."""
    layout: str
    saved_at: float
    """Seconds since 1970."""
    state: str
    """`complete`, `complete, but ...` where other disks have the rest, `unfinished: ...`,
    `no manifest: ...`, or `damaged: ` and the faults."""
    sequence: int = 0
    """Order of publication in its folder, from 1; 0: not published."""
    can_be_opened: bool = False
    """Whether a resume would find all tensors."""
    has_optimizer: bool = False
    is_best: bool = False
    """Whether `best.json` names it."""
    is_next: bool = False
    """Whether a resume takes this one."""

    @property
    def is_damaged(self) -> bool:
        """Whether it has faults."""
        return self.state.startswith("damaged")


def list_checkpoints(path: str | os.PathLike[str], *, data: bool = False) -> list[Listed]:
    """The saves at `path`, a folder of rank folders or a folder of such folders, in order of
    publication. `data`: also read everything and check its checksums. Raises `UserError`.
    """
    root = Path(path)
    folders = [root] if _has_saves(root) else _folders_below(root)
    if not folders:
        near = f"did you mean `{root.parent}`?" if _has_saves(root.parent) else ""
        raise UserError(
            f"{root} holds no checkpoints" if root.exists() else f"{root}: there is no such path",
            rule="they lie in rank_0/, rank_1/, ... of a folder, usually {output_dir}/checkpoint",
            nearest=near,
            advice="Give the output_dir of a run, or its folder of checkpoints",
        )
    return [listed for folder in folders for listed in _of(folder, data)]


def _has_saves(folder: Path) -> bool:
    return folder.is_dir() and detect(folder) == "distributed"


def _folders_below(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(child for child in root.iterdir() if _has_saves(child))


def _of(folder: Path, data: bool) -> list[Listed]:
    manifests = folder / MANIFEST_FOLDER
    found = {save.label: save for save in saves(folder)}
    published = {path.stem for path in manifests.glob("[!.]*.json")}
    begun = {p.name.removeprefix(".").removesuffix(_INTENT)
             for p in manifests.glob(f".*{_INTENT}")}  # fmt: skip
    rows = []
    for label in {*found, *published, *begun}:
        save = found.get(label, Save(label, 0, {}))
        if label in published:
            rows.append(_published(folder, save, data))
        elif label in begun:
            rows.append(_unpublished(folder, save, UNFINISHED))
        else:
            rows.append(_unpublished(folder, save, "no manifest: only its files are known"))
    best = _best(folder)
    rows = [replace(row, is_best=row.name == best) for row in rows]
    rows.sort(key=lambda row: (row.sequence, row.saved_at, row.name))
    return _with_next(rows)


def _best(folder: Path) -> str | None:
    """The name of the save that `best.json` names; None without one."""
    try:
        content = json.loads((folder / BEST_FILE).read_bytes())
        return str(content["save"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _with_next(rows: Sequence[Listed]) -> list[Listed]:
    """Mark the save that a resume takes: the last that can be opened. If it has no optimizer state,
    a resume refuses it."""
    newest = next((row for row in reversed(rows) if row.can_be_opened), None)
    is_taken = newest is not None and newest.has_optimizer
    return [replace(row, is_next=is_taken and row is newest) for row in rows]


def _published(folder: Path, save: Save, data: bool) -> Listed:
    path = folder / MANIFEST_FOLDER / f"{save.label}.json"
    manifest = read_manifest(path)
    if manifest is None:
        return _unpublished(folder, save, f"damaged: {path} cannot be read or was changed")
    state = folder / STATE_FOLDER / f"{save.label}.json"
    lack = state_fault(state, manifest)
    away = ranks_elsewhere(folder, manifest)
    by_file = {
        folder / record["file"]: _faults(folder / record["file"], record, data)
        for record in manifest["files"] if record["rank"] not in away
    }  # fmt: skip
    faults = [*([lack] if lack else []), *itertools.chain.from_iterable(by_file.values())]
    source = None if lack else _source(folder, [f for f, found in by_file.items() if not found])
    aid = "" if source is None else " (a resume reads the replicas of other ranks)"
    return Listed(
        folder,
        save.label,
        manifest.get("global_step"),
        sum(_size(file) for file in (*by_file, state)),
        layout_text(manifest["world_size"], manifest.get("mesh")),
        manifest.get("saved_at") or _modified(path),
        f"damaged{aid}: {'; '.join(faults[:3])}"
        if faults
        else f"complete{', but ' * bool(away)}{text_of_elsewhere(away)}",
        manifest["sequence"],
        # Files on other disks are assumed to be valid.
        can_be_opened=source is not None or (bool(away) and not faults),
        has_optimizer=_has_optimizer([*by_file]),
    )


def _has_optimizer(files: Sequence[Path]) -> bool:
    """Whether the first of `files` that can be read holds optimizer state."""
    for file in files:
        with suppress(UserError):
            return any(is_optimizer_state(name) for name in rank_header_of(file).entries)
    return False


def _source(folder: Path, files: Sequence[Path]) -> Source | None:
    """The source made of files of a save; None where they do not hold all of it."""
    try:
        return open_rank_files(folder, files)
    except UserError:
        return None


def _faults(file: Path, record: dict[str, Any], data: bool) -> list[str]:
    rank, size = record["rank"], _size(file)
    if not file.is_file():
        return [f"rank {rank}: {file} is missing"]
    if size != record["bytes"]:
        return [f"rank {rank}: {file} has {size} bytes instead of {record['bytes']}"]
    return file_faults(file, header_digest=record.get("header_xxh3_64"), data=data)


def _unpublished(folder: Path, save: Save, state: str) -> Listed:
    files = save.in_rank_order
    times = [_modified(file) for file in files]
    size = sum(_size(file) for file in files)
    return Listed(folder, save.label, None, size, layout_text(len(files), None),
                  max(times, default=0.0), state)  # fmt: skip


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # an active run may have removed it
        return 0


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
