"""Integrated saves: complete weights beside the rank files of a save, as `transformers` opens them.

    checkpoint_integrated/CKP-1_10/model.safetensors, config.json, ...
    checkpoint_integrated/CKP-1_10/adapter_model.safetensors, ...       of a run with an adapter

Owns that folder. The weights are streamed from the rank files that were just written, a few tensors
at a time, so that no process has the full model in memory. The folder appears when it is complete,
and is removed with its save, unless it is an input of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from launcher.errors import UserError
from launcher.weights.adapters.found import entry_of, state_of_save
from launcher.weights.joined import together
from launcher.weights.offline.adapter import open_adapter, write_adapter
from launcher.weights.offline.described import described
from launcher.weights.offline.export import write_complete
from launcher.weights.optimizer_state import STATE_PREFIXES
from launcher.weights.ranks.saves import copy_model_files, model_folder, open_save
from launcher.weights.streaming.new_folder import folder_aside

INTEGRATED_FOLDER = "checkpoint_integrated"
FULL = "checkpoint"
"""The folder whose saves are merged. Other folders may have saves with the same names."""


def write_integrated(
    root: Path, name: str, files: Sequence[Path], inputs: Collection[Path] = ()
) -> Path:
    """Merge the weights in the rank `files` of save `name` in `root`. Returns the folder.

    `inputs`: resolved paths that are never replaced. Raises `UserError` and `OSError`.
    """
    folder = folder_of(root, name)
    if _contains_input(folder, inputs):
        raise UserError(
            f"{folder} is an input of this run",
            rule="an input is never written to",
            advice="Give another output_dir",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(folder, root, overwrite=True, owned=True) as aside:
        if entry_of(state_of_save(files[0]), root, files[0]) is not None:
            write_adapter(open_adapter(files[0]), aside)
            return folder
        model = described(None, model_folder(files[0]))
        source = together(open_save(root, files), model.config if model else None)
        write_complete(source, aside, keep=lambda n: not n.startswith(STATE_PREFIXES))
        copy_model_files(files[0], aside)
    return folder


def remove_integrated(root: Path, name: str, inputs: Collection[Path] = ()) -> None:
    """Remove the complete weights of save `name` in `root`, and temporary files of a crash."""
    if root.name != FULL:
        return
    folder = folder_of(root, name)
    if not _contains_input(folder, inputs):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f".{folder.name}.tmp"), ignore_errors=True)


def integrated_names(root: Path) -> list[str]:
    """Names of the saves of `root` with complete weights."""
    folder = folder_of(root, "")
    is_there = root.name == FULL and folder.is_dir()
    return [path.name for path in folder.iterdir()] if is_there else []


def folder_of(root: Path, name: str) -> Path:
    """The folder of the complete weights of save `name`."""
    return root.parent / INTEGRATED_FOLDER / name


def _contains_input(folder: Path, inputs: Collection[Path]) -> bool:
    """Whether an input is `folder`, or is inside of it."""
    place = folder.resolve()
    return any(path.is_relative_to(place) for path in inputs)
