"""Merging the rank files of one save into complete weights, in a folder that appears complete."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.extensions import NAME_WRITERS, RUN_NUMBERS, installed, required
from launcher.weights.adapters.found import entry_of, state_of_save
from launcher.weights.foreign_names import COMPLETE, Named, under_hugging_face_names
from launcher.weights.formats.rank_metadata import REDUNDANCY
from launcher.weights.forms import EXTRAS_NAME
from launcher.weights.joined import together
from launcher.weights.log import Log, no_log
from launcher.weights.offline.described import described, write_description
from launcher.weights.offline.export import DEFAULT_SHARD_BYTES, Exported, write_complete
from launcher.weights.ranks.manifests import STATE_FOLDER
from launcher.weights.ranks.rank_folders import label_of
from launcher.weights.ranks.saves import (
    DEFAULT_SUFFIX,
    MODEL_FOLDER,
    copy_model_files,
    model_folder,
    open_save,
    rank_files,
)
from launcher.weights.source import Source
from launcher.weights.streaming.new_folder import folder_aside
from launcher.weights.streaming.stream import WORKERS, Progress
from launcher.weights.streaming.write import write_file

__all__ = ["MODEL_FOLDER", "merge", "size_in_bytes", "unified_safetensors"]

KEPT_NAMES = "huggingface"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes that weights can be cast to, by their safetensors names."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip


def unified_safetensors(
    mindspore_ckpt_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    src_strategy_dirs: str | os.PathLike[str] | None = None,
    file_suffix: str = DEFAULT_SUFFIX,
    has_redundancy: bool | None = None,
    filter_out_param_prefix: str = "",
    max_process_num: int = WORKERS,
    format: str = "huggingface",
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    overwrite: bool = False,
    config: str | os.PathLike[str] | None = None,
    naming: str | None = None,
    qkv_concat: bool | None = None,
) -> Exported:
    """Merge the save `*-{file_suffix}.safetensors` of the rank folders in `mindspore_ckpt_dir` into
    complete weights in `output_dir`. Names are those of the command of the same name.

    `src_strategy_dirs`: only for rank files that do not describe their layout. `has_redundancy`:
    whether the ranks hold all replicas; the metadata of the files takes precedence.
    `max_process_num`: number of threads. `dtype` (float32, bfloat16, float16): cast the weights.
    `config`, `naming`, `qkv_concat`: see `merge`. Raises `UserError`.
    """
    return merge(
        Path(mindspore_ckpt_dir),
        Path(output_dir),
        suffix=file_suffix,
        strategy=None if src_strategy_dirs is None else Path(src_strategy_dirs),
        has_redundancy=has_redundancy,
        drop_prefixes=(filter_out_param_prefix,) if filter_out_param_prefix else (),
        workers=max_process_num,
        form=format,
        max_shard_bytes=size_in_bytes(max_shard_size),
        dtype=dtype,
        overwrite=overwrite,
        config=None if config is None else Path(config),
        naming=naming,
        qkv_concat=qkv_concat,
    )


def merge(
    directory: Path,
    output_dir: Path,
    *,
    suffix: str,
    strategy: Path | None = None,
    has_redundancy: bool | None = None,
    drop_prefixes: Collection[str] = (),
    form: str = "huggingface",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int = WORKERS,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    log: Log = no_log,
    config: Path | None = None,
    naming: str | None = None,
    qkv_concat: bool | None = None,
    keys: Mapping[str, Any] | None = None,
) -> Exported:
    """Merge the save `suffix` of `directory` into complete weights in `output_dir`.

    Written under a temporary name and renamed when complete. An existing `output_dir` is an error
    without `overwrite`, which replaces it only after the new one is complete. Tensors whose name
    starts with one of `drop_prefixes` are left out. What is read is checked against its checksums.
    `strategy`: path of strategy files, for rank files that need them. `dtype`: a key of `DTYPES`.
    `config`: config.json or YAML file of the model, by default the config.json that its run wrote:
    with it names of MindFormers become those of Hugging Face or, in MindSpore's form, the other way
    round. `naming`: `legacy`, `mcore` or `huggingface` names in that form; None: those of the
    family. `qkv_concat`: with legacy names, write fused projections. `keys`: about the orders of
    rows, see `foreign_names.KEYS`. Raises `UserError`.
    """
    files = rank_files(directory, suffix)
    if entry_of(state_of_save(files[0]), directory, files[0]) is not None:
        raise UserError(
            f"{directory}: the save {suffix} holds an adapter",
            rule="complete weights are those of its base with the adapter merged into them",
            nearest=f"python -m launcher.tools.merge_lora --load_checkpoint {directory} "
            f"--file_suffix {suffix} --output_dir {output_dir}",
            advice="python -m launcher.tools.export_adapter writes the adapter alone",
        )
    source = open_save(directory, files, strategy, log)
    _note_redundancy(source, has_redundancy, log)
    given = {**(keys or {}), "naming": naming, "qkv_concat": qkv_concat}
    named = _named(source, files[0], form, config, given, log)
    with folder_aside(output_dir, directory, overwrite=overwrite) as folder:
        exported = write_complete(
            named.source,
            folder,
            metadata=named.metadata,
            keep=lambda name: not name.startswith(tuple(drop_prefixes)),
            max_shard_bytes=max_shard_bytes,
            form=form,
            workers=workers,
            dtype=None if dtype is None else DTYPES[dtype],
            progress=progress,
        )
        if form != "huggingface":
            _write_numbers(source, files[0], folder, form)
        if not copy_model_files(files[0], folder) and config is not None:
            write_description(folder, described(config))
        if dtype is not None:
            _note_dtype(folder / "config.json", dtype)
    return exported


def _named(
    source: Source, file: Path, form: str, config: Path | None, given: Mapping[str, Any], log: Log
) -> Named:
    """The source under the names that its new form has, as far as the model is known."""
    model = described(config, model_folder(file))
    source = together(source, model.config if model else None)
    if given.get("naming") == KEPT_NAMES and form != "huggingface":
        return Named(source)
    keys = {**(model.keys if model else {}), **{k: v for k, v in given.items() if v is not None}}
    if form == "huggingface":
        config_json = None if model is None else model.config
        keys[COMPLETE] = True
        return Named(under_hugging_face_names(source, config_json, keys, log))
    if model is None or form != "mindspore":
        return Named(source)
    write = required(NAME_WRITERS, form, f"{source.path} is merged in the form of {form}")
    named: Named = write(source, model.config, {**keys, "required": config is not None}, log)
    return named


def _write_numbers(source: Source, file: Path, folder: Path, form: str) -> None:
    """Write the numbers of the run (step, epoch) that its state file has, where the new form keeps
    them beside the weights and the rank files have none."""
    numbers = installed(RUN_NUMBERS).get(form)
    label = label_of(file)
    state = file.parent.parent / STATE_FOLDER / f"{label}.json"
    if numbers is None or source.extras or not state.is_file():
        return
    try:
        content = json.loads(state.read_bytes())
        epoch = int(label.rpartition("-")[2].partition("_")[0])
        parts = numbers(content, epoch)
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # a damaged state file: the weights are complete without it
    write_file(folder / EXTRAS_NAME, parts, {"format": "ms"})


def _note_dtype(config: Path, dtype: str) -> None:
    """Set the dtype in config.json, if there is one."""
    if config.is_file():
        content = json.loads(config.read_bytes())
        content.pop("torch_dtype", None)
        config.write_text(json.dumps({**content, "dtype": dtype}, indent=2, sort_keys=True) + "\n")


def _note_redundancy(source: Source, asserted: bool | None, log: Log) -> None:
    """Log where `has_redundancy` contradicts the files, which take precedence."""
    marked = {header.metadata.get(REDUNDANCY) for header in source.headers.values()} != {None}
    found = not source.is_deduplicated
    if asserted is not None and marked and found != asserted:
        meaning = "every rank holds all its replicas" if found else "replicas were left out"
        log(
            f"has_redundancy = {asserted}: no effect, the files have {REDUNDANCY} = {not found}: "
            f"{meaning}"
        )


def size_in_bytes(size: int | str) -> int:
    """Bytes of `5GB` (decimal), `5GiB` (binary) or a number. Raises `UserError` for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise UserError(
            f"max_shard_size = {size!r}",
            rule="a size is a number and a unit: B, KB, MB, GB, TB, KiB, MiB, GiB or TiB",
            nearest="Possible: 5GB",
        )
    return int(float(match[1]) * factor)
