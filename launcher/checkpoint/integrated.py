"""Integrated saves: complete weights beside the rank files of a save, as `transformers` opens them.

    checkpoint_integrated/CKP-1_10/model.safetensors, config.json, ...

Owns that folder. The weights stream from the rank files that were just written, a few tensors at a
time, so that no process ever holds a whole model. They appear whole or not at all, and go when
their save goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from launcher.checkpoint.names import SaveName
from launcher.weights.offline.export import write_complete
from launcher.weights.ranks.saves import model_files, open_save
from launcher.weights.source import OPTIMIZER_PREFIXES
from launcher.weights.streaming.new_folder import folder_aside

INTEGRATED_FOLDER = "checkpoint_integrated"


def write_integrated(root: Path, name: SaveName, ranks: int) -> Path:
    """Merge the weights of save `name` in `root`, the folder of checkpoints. Returns the folder.

    Raises `UserError` and `OSError`.
    """
    files = [root / f"rank_{rank}" / name.rank_file(rank) for rank in range(ranks)]
    folder = folder_of(root, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(folder, root, overwrite=True) as aside:
        source = open_save(root, files)
        write_complete(source, aside, keep=lambda n: not n.startswith(OPTIMIZER_PREFIXES))
        for file in model_files(files[0]):
            shutil.copy2(file, aside)
    return folder


def remove_integrated(root: Path, names: Sequence[SaveName]) -> None:
    """Let go of those of saves that were let go."""
    for name in names:
        shutil.rmtree(folder_of(root, name), ignore_errors=True)


def folder_of(root: Path, name: SaveName) -> Path:
    """Where the complete weights of a save lie."""
    return root.parent / INTEGRATED_FOLDER / str(name)
