"""Merging: the rank files of one save become complete weights, a Hugging Face directory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from launcher.errors import UserError
from launcher.weights.distributed import open_rank_files
from launcher.weights.export import Exported, write_complete
from launcher.weights.verify import verified

MODEL_FOLDER = "model"
"""Beside the rank folders: for each run, config.json and the tokenizer."""


def rank_files(directory: Path, suffix: str) -> list[Path]:
    """The file of each rank folder that ends in `-{suffix}.safetensors`, in rank order.

    Exact: `1_1` never takes `11_1`. Raises `UserError` for none, and for two in one folder.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such folder")
    folders = [path for path in directory.glob("rank_*") if path.name[5:].isdigit()]
    if not folders:
        raise UserError(
            f"{directory} has no rank folders",
            rule="distributed weights lie in rank_0/, rank_1/, ...",
            advice="Give the folder that holds them, usually {output_dir}/checkpoint",
        )
    files = []
    for folder in sorted(folders, key=lambda path: int(path.name[5:])):
        matches = sorted(folder.glob(f"*-{suffix}.safetensors"))
        if len(matches) > 1:
            raise UserError(
                f"{folder} has two files of the save {suffix}: "
                f"{', '.join(match.name for match in matches)}",
                rule="one file a rank belongs to a save",
                advice="Move the files of the other run away",
            )
        files += matches
    if not files:
        found = sorted({path.stem.rpartition("-")[2] for path in folders[0].glob("*.safetensors")})
        raise UserError(
            f"{directory}: no file of the save {suffix}",
            nearest=f"There are: {', '.join(found)}" if found else "",
            advice="Choose with --file_suffix",
        )
    return files


def model_files(rank_file: Path) -> list[Path]:
    """config.json and the tokenizer of the run that wrote `rank_file`: `CKP_rank_0_1-2_5` is of
    the run `CKP_1`."""
    run = re.sub(r"_rank_\d+(?=(_\d+)?-\d+_\d+$)", "", rank_file.stem).rpartition("-")[0]
    return list((rank_file.parent.parent / MODEL_FOLDER / run).glob("*"))


def merge(
    directory: Path,
    output_dir: Path,
    *,
    suffix: str,
    drop_prefixes: Collection[str] = (),
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Merge the save `suffix` of `directory` into complete weights in `output_dir`.

    Written aside and renamed when whole. An existing `output_dir` is an error unless `overwrite`,
    which replaces it only after the new one is whole. Tensors whose name starts with one of
    `drop_prefixes` are left out.
    """
    files = rank_files(directory, suffix)
    source = verified(open_rank_files(directory, files))
    inside, target = directory.resolve(), output_dir.resolve()
    if inside.is_relative_to(target) or target.is_relative_to(inside):
        raise UserError(
            f"{output_dir} holds, or lies in, {directory}",
            rule="an input is never written to",
            advice="Give another --output_dir",
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(
            f"{output_dir} is a file", rule="a folder is needed", advice="Give another --output_dir"
        )
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise UserError(
            f"{output_dir} is not empty",
            rule="nothing is replaced unasked",
            advice="Give another --output_dir, or --overwrite",
        )
    scratch = output_dir.with_name(f".{output_dir.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        exported = write_complete(
            source,
            scratch,
            keep=lambda name: not name.startswith(tuple(drop_prefixes)) if drop_prefixes else True,
            progress=progress,
        )
        for file in sorted(model_files(files[0])):
            shutil.copy2(file, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if output_dir.exists():
        shutil.rmtree(output_dir)
    os.replace(scratch, output_dir)
    return exported
