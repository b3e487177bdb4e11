"""Cleanup: removes what unfinished saves left in a folder of checkpoints.

Owns which files that is: those of saves that left an in-progress marker and have no manifest. Other
files stay, whatever their names. One process, one file system; `run_folders` does it on all.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from launcher.checkpoint.catalog import in_progress, published, record_of
from launcher.checkpoint.files import TEMPORARY_SUFFIX, sync_directory, temporary
from launcher.checkpoint.integrated import remove_integrated
from launcher.checkpoint.names import FORMATS
from launcher.weights.ranks.manifests import MANIFEST_FOLDER, STATE_FOLDER


def unpublish(root: Path, records: Collection[str]) -> None:
    """Turn published saves into unfinished ones; `records`: the names of their manifests."""
    for record in records:
        manifest = root / MANIFEST_FOLDER / record
        os.replace(manifest, temporary(manifest))
    if records:
        sync_directory(root / MANIFEST_FOLDER)


def unpublish_partial(root: Path, begun: Collection[str]) -> None:
    """Unpublish the saves on several file systems that are unfinished on another (`begun`)."""
    spread = {save.name.record for save in published(root) if save.is_spread}
    unpublish(root, sorted(spread & set(begun)))


def remove_unfinished(
    root: Path, inputs: Collection[Path] = (), begun: Collection[str] = ()
) -> list[Path]:
    """Remove the files of saves that were never finished. Returns what was removed.

    `inputs`: resolved paths that stay. `begun`: records of saves that are unfinished elsewhere.
    """
    removed = []
    for record in sorted({*in_progress(root), *begun}):
        if not (root / MANIFEST_FOLDER / record).exists():
            removed += _files_of(root, record)
            remove_integrated(root, record.removesuffix(".json"), inputs)
        marker = temporary(root / MANIFEST_FOLDER / record)
        removed += [marker] if marker.exists() else []
    remove_files(removed)
    return removed


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files; those that are missing are no error."""
    for path in paths:
        path.unlink(missing_ok=True)


def _files_of(root: Path, record: str) -> list[Path]:
    """Rank and state files of a save, temporary ones too."""
    state = root / STATE_FOLDER / record
    found = [path for path in (state, temporary(state)) if path.exists()]
    for extension in FORMATS:
        for path in root.glob(f"rank_*/*.{extension}*"):
            found += [path] if record_of(path.name) == record else []
        for path in root.glob(f"rank_*/.*.{extension}{TEMPORARY_SUFFIX}"):
            name = path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX)
            found += [path] if record_of(name) == record else []
    return found
