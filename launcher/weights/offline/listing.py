"""Listing: the saves of a folder of checkpoints, one line each, by what is known without reading
the data.

Owns that line. A save is whole when its manifest is sealed, its state is as it was written and each
rank file has the size and the header that the manifest says. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.layout.mesh import layout_text
from launcher.weights.ranks.manifests import (
    MANIFEST_FOLDER,
    STATE_FOLDER,
    read_manifest,
    state_fault,
)
from launcher.weights.ranks.rank_folders import Save, saves
from launcher.weights.reading.checksums import file_faults
from launcher.weights.source import detect

_UNFINISHED = ".json.tmp"


@dataclass(frozen=True)
class Listed:
    """One save."""

    folder: Path
    name: str
    step: int | None
    """Optimizer steps done; None where no manifest says it."""
    nbytes: int
    """Of the rank files and the state."""
    layout: str
    saved_at: float
    """Seconds since 1970."""
    state: str
    """`whole`, `unfinished`, `no manifest`, or `damaged: ` and what is wrong."""
    sequence: int = 0
    """Order of publication in its folder, from 1; 0: not published."""
    is_next: bool = False
    """Whether a resume takes this one."""

    @property
    def is_damaged(self) -> bool:
        """Whether something is wrong with it."""
        return self.state.startswith("damaged")


def list_checkpoints(path: str | os.PathLike[str], *, data: bool = False) -> list[Listed]:
    """The saves at `path`, a folder of rank folders or one that has such folders in it, in order
    of publication. `data` also reads everything and checks its checksums. Raises `UserError`.
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
    begun = {p.name.removeprefix(".").removesuffix(_UNFINISHED)
             for p in manifests.glob(f".*{_UNFINISHED}")}  # fmt: skip
    rows = []
    for label in {*found, *published, *begun}:
        save = found.get(label, Save(label, 0, {}))
        if label in published:
            rows.append(_published(folder, save, data))
        elif label in begun:
            rows.append(_unpublished(folder, save, "unfinished: the next start clears it away"))
        else:
            rows.append(_unpublished(folder, save, "no manifest: its files are all that is known"))
    rows.sort(key=lambda row: (row.saved_at, row.sequence, row.name))
    return _with_next(rows)


def _with_next(rows: Sequence[Listed]) -> list[Listed]:
    whole = [row for row in rows if row.state == "whole"]
    newest = whole[-1] if whole else None
    return [Listed(**{**vars(row), "is_next": row is newest}) for row in rows]


def _published(folder: Path, save: Save, data: bool) -> Listed:
    path = folder / MANIFEST_FOLDER / f"{save.label}.json"
    manifest = read_manifest(path)
    if manifest is None:
        return _unpublished(folder, save, f"damaged: {path} cannot be read or was changed")
    state = folder / STATE_FOLDER / f"{save.label}.json"
    faults = [fault for fault in (state_fault(state, manifest),) if fault]
    faults += _faults(folder, manifest, data)
    files = [folder / record["file"] for record in manifest["files"]]
    return Listed(
        folder,
        save.label,
        manifest.get("global_step"),
        sum(_size(file) for file in (*files, state)),
        layout_text(manifest["world_size"], manifest.get("mesh")),
        manifest.get("saved_at") or path.stat().st_mtime,
        f"damaged: {'; '.join(faults[:3])}" if faults else "whole",
        manifest["sequence"],
    )


def _faults(folder: Path, manifest: dict[str, Any], data: bool) -> Iterator[str]:
    for record in manifest["files"]:
        file = folder / record["file"]
        size = _size(file)
        if not file.is_file():
            yield f"rank {record['rank']}: {file} is missing"
        elif size != record["bytes"]:
            yield f"rank {record['rank']}: {file} has {size} bytes instead of {record['bytes']}"
        else:
            digest = record.get("header_xxh3_64")
            yield from file_faults(file, header_digest=digest, data=data)


def _unpublished(folder: Path, save: Save, state: str) -> Listed:
    files = save.in_rank_order
    times = [file.stat().st_mtime for file in files]
    size = sum(_size(file) for file in files)
    return Listed(folder, save.label, None, size, layout_text(len(files), None),
                  max(times, default=0.0), state)  # fmt: skip


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
