"""Saves: which rank files of a folder belong together, and the source they make.

Owns the names of rank files, `{prefix}_rank_{rank}[_{run}]-{epoch}_{step}.safetensors`, as far as
tools need them, and the comparison with the manifest of a save. Torch-free.
Invariant: what is opened is one save of one run.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.extensions import RANK_FILES, required
from launcher.weights.formats import header_of, rank_header_of
from launcher.weights.log import Log, no_log
from launcher.weights.ranks.distributed import OpenFiles, check_copies
from launcher.weights.ranks.manifests import MANIFEST_FOLDER, read_manifest
from launcher.weights.ranks.rank_folders import (
    RANK_SUFFIXES,
    label_of,
    rank_folders,
    save_of,
    saves,
    weight_files,
)
from launcher.weights.source import (
    Source,
    check_one_kind,
    detect,
    no_weights,
    open_complete,
)

MODEL_FOLDER = "model"
"""Beside the rank folders: for each run, config.json and the tokenizer."""
STRATEGY_FOLDER = "strategy"
"""Beside the folder of rank folders: strategy files."""
DEFAULT_SUFFIX = "1_1"
SHOWN = 8
"""Saves named in a message."""


def rank_files(directory: Path, suffix: str) -> list[Path]:
    """The file of each rank folder that ends in `-{suffix}`, without extension, in rank order.

    Exact: `1_1` never takes `11_1`. `1-1_1` takes the second run that wrote there, whose files are
    `CKP_rank_0_1-1_1` and so on. Raises `UserError` for none, and for two in one folder.
    """
    folders = rank_folders(directory) if directory.is_dir() else {}
    if not folders:
        raise UserError(
            f"{directory} has no rank folders" if directory.is_dir() else
            f"{directory}: there is no such folder",
            rule="distributed weights lie in rank_0/, rank_1/, ...",
            advice="Give the folder that holds them, usually {output_dir}/checkpoint",
        )  # fmt: skip
    files: list[Path] = []
    for folder in folders.values():
        matches = _matches(folder, suffix)
        if len(matches) > 1:
            raise UserError(
                f"{folder} has two files of the save {suffix}: "
                f"{', '.join(match.name for match in matches)}",
                rule="one file a rank belongs to a save",
                nearest="A later run is chosen by its number: 1-1_1 is `..._rank_0_1-1_1`",
                advice="Give such a suffix, or move the files of the other run away",
            )
        files += matches
    if not files:
        others = [file for folder in folders.values() for file in weight_files(folder)]
        if others and others[0].suffix != ".safetensors":
            rank_header_of(others[0])  # raises the error of its format
        found = sorted({file.stem.rpartition("-")[2] for file in others})
        raise UserError(
            f"{directory}: no file of the save {suffix}",
            nearest=f"There are: {', '.join(found[:SHOWN])}" if found else "",
            advice="Choose with --file_suffix",
        )
    return files


def _matches(folder: Path, suffix: str) -> list[Path]:
    """The files of a rank folder whose names end in `suffix`: of safetensors where there are any,
    else `.ckpt`."""
    for extension in RANK_SUFFIXES:
        end = f"{glob.escape(suffix)}{extension}"
        found = sorted(folder.glob(f"*-{end}")) or sorted(folder.glob(f"*_{folder.name}_{end}"))
        if found:
            return found
    return []


def model_folder(rank_file: Path) -> Path:
    """Where the run that wrote `rank_file` puts config.json and the tokenizer."""
    run = label_of(rank_file).rpartition("-")[0]
    return rank_file.parent.parent / MODEL_FOLDER / run


def copy_model_files(rank_file: Path, target: Path) -> bool:
    """Copy config.json and the tokenizer of the run that wrote `rank_file`, with subfolders, into
    `target`. Returns whether there were any."""
    folder = model_folder(rank_file)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        place = target / file.relative_to(folder)
        place.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy2(file, place)
    return bool(files)


def open_save(
    directory: Path, files: Sequence[Path], strategy: Path | None = None, log: Log = no_log
) -> Source:
    """The source of one save, whose files are `files`.

    `strategy`: the strategy files that some rank files need; left out, those in `strategy/` beside
    `directory` are used. Raises `UserError`, also when the files are of two saves.
    """
    check_exists(strategy)
    mark = layout_mark(files[0])
    if mark:
        if strategy is not None:
            log(f"{strategy}: not needed, the rank files describe their layout")
        _check_one_save(directory, files)
    source = rank_file_opener(mark, directory, strategy, log)(directory, files)
    if mark and not _check_manifest(source):
        check_copies(source)
    for remark in source.remarks:
        log(remark)
    return source


def check_exists(strategy: Path | None) -> None:
    """Check that the path of strategy files exists, also where none are needed."""
    if strategy is not None and not os.path.exists(strategy):
        raise UserError(
            f"{strategy}: there is no such path",
            rule="strategy files are looked for there (--src_strategy_dirs)",
            nearest=f"did you mean `{beside}`?"
            if (beside := strategy.parent / STRATEGY_FOLDER).is_dir() else "",
            advice="Name a strategy file, a merged one or the folder of them; files of Slipway "
            "need none",
        )  # fmt: skip


def layout_mark(file: Path) -> str:
    """The metadata key by which a rank file describes its layout, a key of `RANK_FILES`; empty
    where it does not."""
    metadata = header_of(file).metadata
    return next((mark for mark in RANK_FILES if mark and mark in metadata), "")


def rank_file_opener(
    mark: str, directory: Path, strategy: Path | None = None, log: Log = no_log
) -> OpenFiles:
    """What opens the rank files of a save in `directory` that have this `layout_mark`. `strategy`:
    the strategy files that those without one need; left out, they are looked for beside it."""
    make = required(RANK_FILES, mark, f"rank files in {directory} do not describe their layout")
    opener: OpenFiles = make(directory, strategy, log)
    return opener


def _check_one_save(directory: Path, files: Sequence[Path]) -> None:
    names = {label_of(file): file for file in reversed(files)}
    if len(names) > 1:
        *_, other, first = (file.name for file in names.values())
        raise UserError(
            f"{directory} mixes two saves: {first} and {other}",
            rule="the files of a save have the same name except for the rank",
            advice="Move the files of the other run away",
        )


def manifest_of(directory: Path, name: str) -> dict[str, Mapping[str, Any]] | None:
    """The manifest of the save `name`: file, below `directory`, to its record with `rank`, `bytes`
    and `header_xxh3_64`. None without one, or where it cannot be read."""
    try:
        content = read_manifest(directory / MANIFEST_FOLDER / f"{name}.json") or {}
        records = {record["file"]: record for record in content["files"]}
        return {f"{file}": {**record, "rank": int(record["rank"])}
                for file, record in records.items()}  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None


def _check_manifest(source: Source) -> bool:
    """Check that the files are those of the manifest. Returns whether there is one."""
    files = list(source.headers)
    records = manifest_of(source.path, label_of(files[0]))
    for file in files:
        record = (records or {}).get(str(file.relative_to(source.path)), {})
        digest = source.headers[file].digest
        if digest != record.get("header_xxh3_64", digest):
            raise UserError(
                f"{file} is not the file that was published with the save {label_of(file)}",
                where=str(source.path / MANIFEST_FOLDER / f"{label_of(file)}.json"),
                rule="its header has another checksum",
                advice="Copy the file of that run again, or choose another save",
            )
    return records is not None


def open_any_format(
    path: Path, suffix: str | None = None, strategy: Path | None = None, log: Log = no_log
) -> Source:
    """The source at `path`, whatever it is: a file, complete weights, or one save of rank folders.

    `suffix` chooses among several saves; a rank file selects its save. Raises `UserError`.
    """
    kind = detect(path)
    if kind == "nothing":
        raise no_weights(path)
    check_exists(strategy)
    if kind != "distributed":
        source = open_complete(path)
        unused = f"{strategy}: not needed, {path} holds complete weights"
        for remark in (*source.remarks, *([unused] if strategy is not None else [])):
            log(remark)
        return _with_optimizer(source)
    check_one_kind(path)
    if path.is_file():
        return open_save(path.parent.parent, save_of(path).in_rank_order, strategy, log)
    if suffix is not None:
        return open_save(path, rank_files(path, suffix), strategy, log)
    found = saves(path)
    if len(found) != 1:
        raise UserError(
            f"{path} holds {len(found) or 'no'} saves",
            rule="one of them is read",
            nearest=f"There are: {', '.join(save.label for save in found[-SHOWN:])}",
            advice="Choose with --file_suffix, or name one of its files",
        )
    return open_save(path, found[0].in_rank_order, strategy, log)


def _with_optimizer(source: Source) -> Source:
    """Complete weights with the optimizer state beside them, which the index does not list."""
    files = [] if source.kind == "single" else optimizer_files(source.path)
    for file in files:
        if file not in source.headers:
            state = open_complete(file)
            source = replace(
                source,
                tensors={**source.tensors, **state.tensors},
                headers={**source.headers, **state.headers},
            )
    return source


def optimizer_files(folder: Path) -> list[Path]:
    """The files of optimizer state beside complete weights."""
    return sorted(folder.glob("optimizer-*-of-*.safetensors"))
