"""From a dataset section to memory-mapped rows: tokenize once, cache the result, map it on every
rank.

Owns the data cache. Invariants:

1. A folder of the cache is named by a hash of everything that decides its content: the bytes of the
   files, their kinds and splits, the settings, the tokenizer. Where the files lie is no part of it,
   so that moved, copied or touched files are not tokenized again. With `num_samples`, which reads
   only the beginning of the data, path, size and time of the files stand for their bytes.
2. One rank of each file system reads the sources and writes the cache; every rank ends with the
   same dataset or the same error. No machine needs the cache of another one.
3. The cache may be deleted at any time between runs; nothing else is kept in it.
"""

from __future__ import annotations

import errno
import json
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import DatasetSection
from launcher.data.cache import (
    FACTS,
    Lease,
    make_once,
    make_room,
    take_lease,
)
from launcher.data.cache_key import folder_key, is_stream, unusual_strategy
from launcher.data.chat_rendering import ChatSettings
from launcher.data.files import DataFile
from launcher.data.loaders import (
    loader_of,
    row_loader_of,
    source_files,
)
from launcher.data.loaders.base import Log, Recipe
from launcher.data.packing import (
    PLAN_ARRAYS,
    RowPlan,
    SampleRows,
    StreamRows,
    plan_rows,
)
from launcher.data.progress import OnProgress, ignore_progress
from launcher.data.rows import RowDataset, Rows
from launcher.data.store import INDEX_DTYPE, map_array, open_store, write_array
from launcher.data.tally import Tally
from launcher.data.tokenizing import tokenize_files
from launcher.errors import UserError

MAX_PATHS = 10_000
"""Files whose paths are kept with a dataset, for its warnings."""

Once = Callable[[Callable[[], str]], str]


def build_dataset(
    section: DatasetSection,
    *,
    tokenizer: Any,
    seq_length: int,
    cache_dir: Path,
    once: Once,
    log: Log,
    on_progress: OnProgress = ignore_progress,
    workers: int = 1,
    max_cache_bytes: int | None = None,
    model_config: Mapping[str, Any] | None = None,
    chat: ChatSettings | None = None,
    phase: str = "train",
) -> RowDataset:
    """The rows of one dataset section, tokenized now or read from the cache.

    Every rank calls this with the same arguments; `log` and `on_progress` are called on the ranks
    that prepare the data, with `workers` processes at most. `once` runs a function on one of the
    ranks that share `cache_dir` and returns its result on each of them. `max_cache_bytes`: what the
    cache may have when a folder is added, apart from those in use. Raises UserError, the same on
    every rank.
    """
    recipe = Recipe(
        section=section,
        tokenizer=tokenizer,
        seq_length=seq_length,
        cache_dir=Path(cache_dir),
        log=log,
        on_progress=on_progress,
        workers=workers,
        model_config=model_config or {},
        chat=chat or ChatSettings(),
        phase=phase,
    )
    row_loader = row_loader_of(recipe.loader)
    if row_loader is not None:
        return row_loader.open(recipe, once(lambda: row_loader.prepare(recipe)))
    leases: list[Lease] = []  # of the rank that prepares, until it has opened the folder

    def prepare() -> str:
        folder, lease, is_new = _ensure_folder(recipe)
        leases.append(lease)
        if is_new and max_cache_bytes is not None:
            make_room(recipe.cache_dir, max_cache_bytes, keep=folder, log=log)
        return folder.name

    try:
        return _open_leased(recipe.cache_dir / once(prepare), recipe)
    finally:
        for lease in leases:
            lease.close()


def _open_leased(folder: Path, recipe: Recipe) -> RowDataset:
    """The dataset in `folder`, which nobody deletes while its rows are used."""
    lease = take_lease(folder)
    dataset = _open(folder, recipe)
    if lease is not None:
        weakref.finalize(dataset.rows, lease.close)
    return dataset


def _ensure_folder(recipe: Recipe) -> tuple[Path, Lease, bool]:
    """The folder of the cache with this dataset, created where it does not exist, in use until the
    lease is closed; and whether this job has made it."""
    started = time.monotonic()
    files = source_files(recipe.loader)
    try:
        recipe.cache_dir.mkdir(parents=True, exist_ok=True)
        folder = recipe.cache_dir / folder_key(recipe, files)
        lease, is_new = _used(folder, recipe), False
        if lease is None:
            lease, is_new = _made(folder, recipe, files)
    except OSError as error:
        raise _not_written(recipe, error) from error
    origin = f"{time.monotonic() - started:.1f} s" if is_new else f"from the cache {folder}"
    metadata = _metadata(folder)
    unit = loader_of(recipe.loader).unit
    rows = len(open_rows(folder, recipe))
    recipe.log(
        f"data: {metadata['read']:,} {unit} of {metadata['files']:,} file(s), "
        f"{metadata['tokens']:,} tokens, {rows:,} rows of {recipe.seq_length} ({origin})"
    )
    for line in metadata["warnings"]:
        recipe.log(_with_present_paths(line, metadata["paths"], files))
    return folder, lease, is_new


def _used(folder: Path, recipe: Recipe) -> Lease | None:
    """The use of a folder that exists and is complete."""
    lease = take_lease(folder)
    if lease is not None and not _is_complete(folder, recipe):
        lease.close()
        return None
    return lease


def _made(folder: Path, recipe: Recipe, files: list[DataFile]) -> tuple[Lease, bool]:
    """The use of a folder that this job makes, or another one at the same time; and whether it was
    this one."""
    while True:
        is_new = make_once(
            folder,
            lambda scratch: _fill(scratch, recipe, files),
            lambda: _is_complete(folder, recipe),
            verb="tokenize",
            log=recipe.log,
            on_progress=recipe.on_progress,
        )
        lease = take_lease(folder)
        if lease is not None:  # else another job has deleted the folder already
            return lease, is_new


def _fill(scratch: Path, recipe: Recipe, files: list[DataFile]) -> None:
    """Read, tokenize, assign samples to rows, write."""
    tally = Tally()
    metadata = tokenize_files(scratch, recipe, files, tally)
    metadata |= {
        "files": len(files),
        "paths": [str(file.path) for file in files[:MAX_PATHS]],
        "read": tally.documents,
        "warnings": tally.warnings(recipe.seq_length),
    }
    assign_rows(scratch, recipe, metadata)
    if len(open_rows(scratch, recipe)) == 0:
        raise _nothing_to_train_on(recipe, files, metadata)
    _check_unchanged(recipe, files)


def assign_rows(
    folder: Path, recipe: Recipe, metadata: dict[str, Any], *, durable: bool = True
) -> None:
    """Assign the samples of a token store to rows, in the files that `open_rows` maps. `metadata`
    of the store is completed; not `durable`: the files need not outlive a crash of the machine."""
    if not is_stream(recipe):
        store = open_store(folder, metadata)
        own = loader_of(recipe.loader).plan
        if own is not None:
            plan = own(store, recipe.seq_length)
        else:
            plan = plan_rows(store, recipe.seq_length, packed=recipe.section.packing)
        metadata |= {"rows": len(plan.target_counts), "row_samples": len(plan.samples)}
        metadata |= {"cut": plan.cut, "dropped": plan.dropped}
        metadata["warnings"] += _plan_warnings(plan, recipe)
        for name in PLAN_ARRAYS:
            values = getattr(plan, name).astype(INDEX_DTYPE)
            write_array(folder / f"{name}.bin", values, durable=durable)
    (folder / FACTS).write_text(json.dumps(metadata, indent=1) + "\n")


def _check_unchanged(recipe: Recipe, files: list[DataFile]) -> None:
    """The files are still those whose content the name of the folder is made of."""
    found = {file.path: file for file in source_files(recipe.loader)}
    for file in files:
        if found.get(file.path) != file:
            raise UserError(
                "has changed while it was read",
                where=str(file.path),
                rule="the files of a dataset must not change while they are tokenized",
                advice="Start again when the program that writes it has ended",
            )


def _with_present_paths(line: str, before: list[str], files: list[DataFile]) -> str:
    """A warning with the paths that the same files have now."""
    for old, file in zip(before, files, strict=False):
        if old != str(file.path) and old in line:
            return line.replace(old, str(file.path))
    return line


def _not_written(recipe: Recipe, error: OSError) -> UserError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UserError(
        f"the data cache cannot be written ({error.strerror or error})",
        where=str(error.filename or recipe.cache_dir),
        rule="tokens are cached in a folder that this user may write to, 4 bytes a token"
        if is_full
        else "tokens are cached in a folder that this user may write to",
        advice="Free some space there, set data_cache.dir to another disk or data_cache.max_gb to "
        "delete old datasets; nothing of this one was left behind"
        if is_full
        else "Give write permission, or set data_cache.dir or another output_dir",
    )


def _open(folder: Path, recipe: Recipe) -> RowDataset:
    metadata = _metadata(folder)
    return RowDataset(
        rows=open_rows(folder, recipe),
        seq_length=recipe.seq_length,
        packed=recipe.section.packing,
        content=metadata["content"],
        largest_token=metadata["largest_token"],
        settings=unusual_strategy(recipe),
        sequences=loader_of(recipe.loader).sequences,
        cached_in=str(folder),
    )


def open_rows(folder: Path, recipe: Recipe) -> Rows:
    """Map the rows in a folder. Raises OSError or ValueError for damaged files."""
    metadata = _metadata(folder)
    store = open_store(folder, metadata)
    if is_stream(recipe):
        return StreamRows(store, recipe.seq_length, _pad_token(recipe))
    lengths = {"row_starts": metadata["rows"] + 1, "samples": metadata["row_samples"]}
    plan = RowPlan.of_arrays(
        map_array(folder / f"{name}.bin", INDEX_DTYPE, lengths.get(name, metadata["rows"]))
        for name in PLAN_ARRAYS
    )
    own = loader_of(recipe.loader).rows
    if own is not None:
        return own(store, plan, recipe.seq_length, _pad_token(recipe))
    return SampleRows(
        store, plan, recipe.seq_length, _pad_token(recipe), packed=recipe.section.packing
    )


def _pad_token(recipe: Recipe) -> int:
    known = (recipe.tokenizer.pad_token_id, recipe.tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    try:
        _open(folder, recipe)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _metadata(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return metadata


def _plan_warnings(plan: RowPlan, recipe: Recipe) -> list[str]:
    if not plan.cut:
        return []
    return [f"warning: {plan.cut} sample(s) longer than seq_length {recipe.seq_length} were cut"]


def _nothing_to_train_on(
    recipe: Recipe, files: list[DataFile], metadata: dict[str, Any]
) -> UserError:
    shown = ", ".join(repr(path) for path in recipe.loader.paths)
    return UserError(
        f"data_loader: {shown} has nothing to train on ({len(files)} file(s), "
        f"{metadata['read']} document(s), {metadata['tokens']} token(s))",
        rule="a dataset needs at least two tokens of text, or one answer that fits into a row",
        nearest=f"The first file is {files[0].path}",
        advice=_why_nothing(recipe, metadata["warnings"]),
    )


def _why_nothing(recipe: Recipe, warnings: list[str]) -> str:
    """What may have left nothing of the data."""
    if warnings:
        return "; ".join(line.removeprefix("warning: ") for line in warnings)
    if recipe.loader.split != "train" or recipe.loader.transforms:
        return "Look into the files, data_loader.split and data_loader.transforms"
    return "Look into the files"
