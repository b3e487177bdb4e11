"""Copies: folders of weights that a run writes beside its output, and may replace.

Owns the record that stands in such a folder: under which key it was written, and which files are
its own. Torch-free. Invariant: a folder is replaced only when it holds just what its record names,
and was written under the same key; anything else in it is somebody's work.
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
    """Why `folder` may not be replaced by a copy written under `key`; empty when it may, or when
    there is nothing to replace."""
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
    return f"{folder} holds {others[0]}, which no run wrote there as a copy" if others else ""


def write_record(folder: Path, key: str) -> None:
    """Say in `folder` that all it holds was written under `key`."""
    files = sorted(child.name for child in folder.iterdir())
    (folder / RECORD).write_text(json.dumps({"key": key, "files": files}, indent=1) + "\n")
