"""Integrated saves: complete weights beside the rank files of a save, as `transformers` opens them.

    checkpoint_integrated/CKP-1_10/model.safetensors, config.json, ...

Owns that folder. The weights stream from the rank files that were just written, a few tensors at a
time, so that no process ever holds a whole model. They appear whole or not at all, and go when
their save goes; what a run was started from stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from launcher.checkpoint.published import Published
from launcher.errors import UserError
from launcher.weights.offline.export import write_complete
from launcher.weights.optimizer_state import STATE_PREFIXES
from launcher.weights.ranks.saves import copy_model_files, open_save
from launcher.weights.streaming.new_folder import folder_aside

INTEGRATED_FOLDER = "checkpoint_integrated"
FULL = "checkpoint"
"""The folder whose saves are merged. Saves of other folders may bear the same names."""


def write_integrated(checkpoint: Published, inputs: Collection[Path] = ()) -> Path:
    """Merge the weights of a checkpoint. Returns the folder.

    `inputs`: resolved paths that are never replaced. Raises `UserError` and `OSError`.
    """
    root, files = checkpoint.root, checkpoint.files
    folder = folder_of(root, str(checkpoint.name))
    if _holds(folder, inputs):
        raise UserError(
            f"{folder} is what this run was started from",
            rule="an input is never written to",
            advice="Give another output_dir",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(folder, root, overwrite=True) as aside:
        source = open_save(root, files)
        write_complete(source, aside, keep=lambda n: not n.startswith(STATE_PREFIXES))
        copy_model_files(files[0], aside)
    return folder


def remove_integrated(root: Path, name: str, inputs: Collection[Path] = ()) -> None:
    """Let go of that of save `name` in `root`, and of what a crash left of writing it."""
    if root.name != FULL:
        return
    folder = folder_of(root, name)
    if not _holds(folder, inputs):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f".{folder.name}.tmp"), ignore_errors=True)


def integrated_names(root: Path) -> list[str]:
    """The saves of `root` whose complete weights lie beside it."""
    folder = folder_of(root, "")
    is_there = root.name == FULL and folder.is_dir()
    return [path.name for path in folder.iterdir()] if is_there else []


def folder_of(root: Path, name: str) -> Path:
    """Where the complete weights of save `name` lie."""
    return root.parent / INTEGRATED_FOLDER / name


def _holds(folder: Path, inputs: Collection[Path]) -> bool:
    """Whether an input is `folder`, or lies in it."""
    place = folder.resolve()
    return any(path.is_relative_to(place) for path in inputs)
