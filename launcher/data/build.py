"""From a dataset section to memory-mapped rows: tokenize once, cache the result, map it on every
rank.

Owns the data cache. Invariants:

1. A folder of the cache is named by a hash of everything that decides its content: the files (path,
   size, modification time), the settings, the tokenizer. It is written under a temporary name and
   renamed when it is complete.
2. One rank of each file system reads the sources and writes the cache; every rank ends with the
   same dataset or the same error. No machine needs the cache of another one.
3. The cache may be deleted at any time between runs; nothing else is kept in it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from xxhash import xxh3_128

from launcher.config.schema import DatasetSection
from launcher.data.files import DataFile
from launcher.data.loaders import (
    loader_of,
    loader_type,
    read_samples,
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
from launcher.data.rows import RowDataset, Rows
from launcher.data.store import INDEX_DTYPE, TokenWriter, map_array, open_store, write_array
from launcher.data.tally import Tally
from launcher.data.templates import DEFAULT_CHAT_TEMPLATE
from launcher.data.tokens import backend_of
from launcher.errors import UserError

CACHE_VERSION = 2
"""Part of every key: raise it when the same input would be stored in another way."""
PROGRESS_SECONDS = 10.0
LEFTOVER_SECONDS = 86400.0

Once = Callable[[Callable[[], str]], str]


def build_dataset(
    section: DatasetSection,
    *,
    tokenizer: Any,
    seq_length: int,
    cache_dir: Path,
    once: Once,
    log: Log,
    model_config: Mapping[str, Any] | None = None,
) -> RowDataset:
    """The rows of one dataset section, tokenized now or read from the cache.

    Every rank calls this with the same arguments; `log` is called on the ranks that prepare the
    data. `once` runs a function on one of the ranks that share `cache_dir` and returns its result
    on each of them. Raises UserError, the same on every rank.
    """
    recipe = Recipe(
        section=section,
        tokenizer=tokenizer,
        seq_length=seq_length,
        cache_dir=Path(cache_dir),
        log=log,
        model_config=model_config or {},
    )
    row_loader = row_loader_of(recipe.loader)
    if row_loader is not None:
        return row_loader.open(recipe, once(lambda: row_loader.prepare(recipe)))
    settings = settings_of(recipe)
    name = once(lambda: _ensure_folder(recipe, settings).name)
    return _open(recipe.cache_dir / name, recipe)


def _ensure_folder(recipe: Recipe, settings: dict[str, Any]) -> Path:
    """The folder of the cache with this dataset, created where it does not exist."""
    started = time.monotonic()
    files = source_files(recipe.loader)
    key = hash_of([settings, [[str(f.path.resolve()), f.size, f.mtime_ns] for f in files]])
    folder = recipe.cache_dir / key
    try:
        recipe.cache_dir.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not _is_complete(folder, recipe):
            recipe.log(f"warning: the cached tokens in {folder} are damaged and are made again")
            shutil.rmtree(folder)
        origin = f"from the cache {folder}"
        if not folder.exists():
            _make(folder, recipe, files)
            origin = f"{time.monotonic() - started:.1f} s"
    except OSError as error:
        raise UserError(
            f"the data cache cannot be written ({error.strerror or error})",
            where=str(error.filename or recipe.cache_dir),
            rule="tokens are cached in a folder that this user may write to",
            advice="Free some space, give write permission, or set another output_dir",
        ) from error
    metadata = _metadata(folder)
    unit = loader_of(recipe.loader).unit
    rows = len(open_rows(folder, recipe))
    recipe.log(
        f"data: {metadata['read']:,} {unit} of {metadata['files']:,} file(s), "
        f"{metadata['tokens']:,} tokens, {rows:,} rows of {recipe.seq_length} ({origin})"
    )
    for line in metadata["warnings"]:
        recipe.log(line)
    return folder


def _make(folder: Path, recipe: Recipe, files: list[DataFile]) -> None:
    """Read, tokenize, assign samples to rows, write: all of it or nothing."""
    _remove_leftovers(folder.parent)
    scratch = folder.parent / f".{folder.name}.{uuid4().hex}.tmp"
    scratch.mkdir()
    try:
        tally = Tally()
        samples = read_samples(recipe.loader, files, recipe.cache_dir, tally)
        metadata = write_rows(scratch, recipe, samples, tally, files=len(files))
        if len(open_rows(scratch, recipe)) == 0:
            raise _nothing_to_train_on(recipe, files, metadata)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another run was faster, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_rows(
    folder: Path,
    recipe: Recipe,
    samples: Iterable[Any],
    tally: Tally,
    *,
    files: int = 1,
    durable: bool = True,
) -> dict[str, Any]:
    """Tokenize samples and assign them to rows, in the files that `open_rows` maps.

    `samples` are those of the data loader of `recipe`, which counts what it leaves out in `tally`;
    `files`: how many they come from. Not `durable`: the files need not outlive a crash of the
    machine. Returns the metadata of the folder.
    """
    metadata = _tokenize(folder, recipe, samples, tally, durable=durable)
    metadata |= {
        "files": files,
        "read": tally.documents,
        "warnings": tally.warnings(recipe.seq_length),
    }
    if not _is_stream(recipe):
        store = open_store(folder, metadata)
        plan = plan_rows(store, recipe.seq_length, packed=recipe.section.packing)
        metadata |= {"rows": len(plan.target_counts), "row_samples": len(plan.samples)}
        metadata |= {"cut": plan.cut, "dropped": plan.dropped}
        metadata["warnings"] += _plan_warnings(plan, recipe)
        for name in PLAN_ARRAYS:
            values = getattr(plan, name).astype(INDEX_DTYPE)
            write_array(folder / f"{name}.bin", values, durable=durable)
    (folder / "facts.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return metadata


def _tokenize(
    folder: Path, recipe: Recipe, samples: Iterable[Any], tally: Tally, *, durable: bool
) -> dict[str, Any]:
    loader = loader_of(recipe.loader)
    writer = TokenWriter(folder, with_targets=loader.has_targets, durable=durable)
    progress = _Progress(tally, writer, recipe.log)
    try:
        for batch in loader.tokenize(samples, recipe, tally):
            writer.add(*batch)
            progress.report()
        return writer.finish()
    finally:
        writer.close()


class _Progress:
    """A log line every few seconds, for corpora that take long."""

    def __init__(self, tally: Tally, writer: TokenWriter, log: Log) -> None:
        self._tally, self._writer, self._log = tally, writer, log
        self._started = self._last = time.monotonic()

    def report(self) -> None:
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        speed = self._writer.tokens / (now - self._started)
        self._log(
            f"tokenizing: {self._tally.documents:,} read, {self._writer.tokens:,} tokens, "
            f"{speed:,.0f} tokens/s"
        )


def _open(folder: Path, recipe: Recipe) -> RowDataset:
    metadata = _metadata(folder)
    return RowDataset(
        rows=open_rows(folder, recipe),
        seq_length=recipe.seq_length,
        packed=recipe.section.packing,
        content=metadata["content"],
        largest_token=metadata["largest_token"],
    )


def open_rows(folder: Path, recipe: Recipe) -> Rows:
    """Map the rows in a folder of `write_rows`. Raises OSError or ValueError for damaged files."""
    metadata = _metadata(folder)
    store = open_store(folder, metadata)
    if _is_stream(recipe):
        return StreamRows(store, recipe.seq_length, _pad_token(recipe))
    lengths = {"row_starts": metadata["rows"] + 1, "samples": metadata["row_samples"]}
    plan = RowPlan.of_arrays(
        map_array(folder / f"{name}.bin", INDEX_DTYPE, lengths.get(name, metadata["rows"]))
        for name in PLAN_ARRAYS
    )
    return SampleRows(
        store, plan, recipe.seq_length, _pad_token(recipe), packed=recipe.section.packing
    )


def _is_stream(recipe: Recipe) -> bool:
    """Whether documents are one stream of tokens, which is cut into rows when they are read."""
    return recipe.section.packing and not loader_of(recipe.loader).has_targets


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
    metadata: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return metadata


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the content of a folder of the cache, apart from the data files."""
    loader, tokenizer = recipe.loader, recipe.tokenizer
    return {
        "version": CACHE_VERSION,
        "type": loader_type(loader),
        "paths": loader.paths,
        "suffixes": list(loader.suffixes or ()),
        "text_column": loader.text_column,
        "format": loader.format,
        "strict_fields": loader.strict_fields,
        "split": loader.split,
        "num_samples": loader.num_samples,
        "packing": recipe.section.packing,
        # A stream is cut into rows when it is read, so that one folder serves every length.
        "seq_length": None if _is_stream(recipe) else recipe.seq_length,
        "tokenizer": _tokenizer_hash(tokenizer),
        "chat_template": getattr(tokenizer, "chat_template", None) or DEFAULT_CHAT_TEMPLATE,
    }


def _tokenizer_hash(tokenizer: Any) -> str:
    if getattr(tokenizer, "is_fast", False):
        content = backend_of(tokenizer).to_str()
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hash_of([content, tokenizer.eos_token_id, str(tokenizer.special_tokens_map)])


def hash_of(value: Any) -> str:
    """The hash of a value that JSON can express."""
    return xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
        advice="; ".join(metadata["warnings"]) or "Look into the files",
    )


def _remove_leftovers(cache_dir: Path) -> None:
    """Delete temporary folders of runs that were killed more than a day ago."""
    for leftover in cache_dir.glob(".*.tmp"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
