"""Copies of weights: folders that a run writes into its output_dir, and may replace.

Owns the record in such a folder: the key that it was written for, and the list of its files.
Torch-free. Invariant: a folder is replaced only if it was written for the same key and holds
exactly the files in its record; other files are the user's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

RECORD = "written_by_slipway.json"

FOLDERS = {
    "save_unified_checkpoint": "unified_checkpoint",
    "save_converted_checkpoint": "ms_safetensors",
}
"""Key of the configuration to its folder in output_dir."""


def foreign(folder: Path, key: str) -> str:
    """Why `folder` may not be replaced by a copy for `key`; empty where it may be."""
    if not os.path.lexists(folder):
        return ""
    if folder.is_symlink() or not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        names = {child.name for child in folder.iterdir()}
        record = json.loads((folder / RECORD).read_bytes()) if RECORD in names else {}
        own = {RECORD, *record["files"]} if record.get("key") == key else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{folder} cannot be read"
    others = sorted(names - own)
    return f"{folder} holds {others[0]}, which is not part of a copy of a run" if others else ""


def write_record(folder: Path, key: str) -> None:
    """Record in `folder` that all its files were written for `key`."""
    files = sorted(child.name for child in folder.iterdir())
    (folder / RECORD).write_text(json.dumps({"key": key, "files": files}, indent=1) + "\n")
