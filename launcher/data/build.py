"""From a dataset section to mapped rows: tokenise once, keep the result, let every rank map it.

Owns the data cache. Invariants:

1. A folder of the cache is named by a hash of everything that decides its content: the files (path,
   size, time of change), the settings, the tokenizer. It is written under another name and renamed
   when it is complete, so a folder with its right name is whole.
2. One rank of each disk reads sources and writes there; every rank ends with the same dataset or
   the same error. No machine needs the cache of another one.
3. The whole cache may be deleted at any time between runs; nothing else lives in it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from xxhash import xxh3_128

from launcher.config.schema import DatasetSection
from launcher.data.chat import tokenize_conversations
from launcher.data.files import DataFile
from launcher.data.packing import (
    PLAN_ARRAYS,
    RowDataset,
    RowPlan,
    Rows,
    SampleRows,
    StreamRows,
    plan_rows,
)
from launcher.data.sources import (
    INSTRUCTION,
    Document,
    conversations,
    documents,
    loader_type,
    source_files,
)
from launcher.data.store import INDEX_DTYPE, TokenWriter, map_array, open_store, write_array
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.data.templates import DEFAULT_CHAT_TEMPLATE
from launcher.data.tokens import backend_of, tokenise_documents
from launcher.errors import UserError

CACHE_VERSION = 2
"""Part of every key: raise it when the same input would be stored in another way."""
PROGRESS_SECONDS = 10.0
LEFTOVER_SECONDS = 86400.0

Log = Callable[[str], None]
Once = Callable[[Callable[[], str]], str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be made, and where it is kept."""

    section: DatasetSection
    tokenizer: Any
    seq_length: int
    cache_dir: Path
    log: Log

    @property
    def is_instruction(self) -> bool:
        return loader_type(self.section.data_loader) == INSTRUCTION

    @property
    def is_stream(self) -> bool:
        """Packed text is kept as one stream, and cut into rows when they are asked for."""
        return self.section.packing and not self.is_instruction

    @property
    def pad_token(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in known if token is not None)


def build_dataset(
    section: DatasetSection,
    *,
    tokenizer: Any,
    seq_length: int,
    cache_dir: Path,
    once: Once,
    log: Log,
) -> RowDataset:
    """The rows of one dataset section, tokenised here or taken from the cache.

    Every rank calls this with the same arguments; `say` is used by the ranks that prepare the data.
    `once` runs a function on one of the ranks that share `cache_dir` and returns what it gave to
    each of them. Raises UserError, the same on every rank.
    """
    recipe = Recipe(
        section=section,
        tokenizer=tokenizer,
        seq_length=seq_length,
        cache_dir=Path(cache_dir),
        log=log,
    )
    settings = _settings(recipe)
    name = once(lambda: _ensure_folder(recipe, settings).name)
    return _open(recipe.cache_dir / name, recipe)


def _ensure_folder(recipe: Recipe, settings: dict[str, Any]) -> Path:
    """The folder of the cache that holds this dataset, made if it is not there."""
    started = time.monotonic()
    files = source_files(recipe.section.data_loader)
    key = _hash([settings, [[str(f.path.resolve()), f.size, f.mtime_ns] for f in files]])
    folder = recipe.cache_dir / key
    try:
        recipe.cache_dir.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not _is_complete(folder, recipe):
            recipe.log(f"warning: the cached tokens in {folder} are damaged, they are made anew")
            shutil.rmtree(folder)
        origin = f"from the cache {folder}"
        if not folder.exists():
            _make(folder, recipe, files)
            origin = f"{time.monotonic() - started:.1f} s"
    except OSError as error:
        raise UserError(
            f"the data cache cannot be written ({error.strerror or error})",
            where=str(error.filename or recipe.cache_dir),
            rule="tokens are kept in a folder that this program may write to",
            advice="Free some space, give write permission, or set another output_dir",
        ) from error
    metadata = _metadata(folder)
    kind = "conversations" if recipe.is_instruction else "documents"
    rows = len(_rows(folder, recipe).target_counts)
    recipe.log(
        f"data: {metadata['read']:,} {kind} of {metadata['files']:,} file(s), "
        f"{metadata['tokens']:,} tokens, {rows:,} rows of {recipe.seq_length} ({origin})"
    )
    for line in metadata["warnings"]:
        recipe.log(line)
    return folder


def _make(folder: Path, recipe: Recipe, files: list[DataFile]) -> None:
    """Read, tokenise, plan the rows, write: all of it or nothing."""
    _remove_leftovers(folder.parent)
    scratch = folder.parent / f".{folder.name}.{uuid4().hex}.tmp"
    scratch.mkdir()
    try:
        tally = Tally()
        metadata = _tokenise(scratch, recipe, files, tally)
        metadata |= {
            "files": len(files),
            "read": tally.documents,
            "warnings": tally.warnings(recipe.seq_length),
        }
        if not recipe.is_stream:
            store = open_store(scratch, metadata)
            plan = plan_rows(store, recipe.seq_length, packed=recipe.section.packing)
            metadata |= {"rows": len(plan.target_counts), "row_samples": len(plan.samples)}
            metadata["warnings"] += _plan_warnings(plan, recipe)
            for name in PLAN_ARRAYS:
                write_array(scratch / f"{name}.bin", getattr(plan, name).astype(INDEX_DTYPE))
        (scratch / "facts.json").write_text(json.dumps(metadata, indent=1) + "\n")
        if len(_rows(scratch, recipe).target_counts) == 0:
            raise _nothing_to_learn(recipe, files, metadata)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another run was faster, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tokenise(folder: Path, recipe: Recipe, files: list[DataFile], tally: Tally) -> dict[str, Any]:
    loader, tokenizer = recipe.section.data_loader, recipe.tokenizer
    writer = TokenWriter(folder, with_targets=recipe.is_instruction)
    progress = _Progress(tally, writer, recipe.log)
    try:
        if recipe.is_instruction:
            talks = conversations(loader, files, recipe.cache_dir, tally)
            strictness = Strictness(strict=loader.strict_fields, tally=tally)
            for samples in tokenize_conversations(
                talks, tokenizer, recipe.log, strictness, recipe.seq_length
            ):
                writer.add([s.tokens for s in samples], [s.is_target for s in samples])
                progress.report()
        else:
            places: deque[str] = deque()
            found = documents(loader, files, recipe.cache_dir, tally)
            for batch in tokenise_documents(_texts(found, places), tokenizer):
                writer.add(batch)
                for tokens in batch:
                    where = places.popleft()
                    if len(tokens) < 2:
                        tally.too_short.add(where)
                progress.report()
        return writer.finish()
    finally:
        writer.close()


def _texts(found: Iterable[Document], places: deque[str]) -> Iterator[str]:
    """The texts of documents; their places go to `places`, in the same order."""
    for document in found:
        places.append(document.where)
        yield document.text


class _Progress:
    """A line every few seconds, for corpora that take long."""

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
            f"tokenising: {self._tally.documents:,} read, {self._writer.tokens:,} tokens, "
            f"{speed:,.0f} tokens/s"
        )


def _open(folder: Path, recipe: Recipe) -> RowDataset:
    metadata = _metadata(folder)
    return RowDataset(
        rows=_rows(folder, recipe),
        seq_length=recipe.seq_length,
        packed=recipe.section.packing,
        content=metadata["content"],
        largest_token=metadata["largest_token"],
    )


def _rows(folder: Path, recipe: Recipe) -> Rows:
    metadata = _metadata(folder)
    store = open_store(folder, metadata)
    if recipe.is_stream:
        return StreamRows(store, recipe.seq_length, recipe.pad_token)
    lengths = {"row_starts": metadata["rows"] + 1, "samples": metadata["row_samples"]}
    plan = RowPlan.of_arrays(
        map_array(folder / f"{name}.bin", INDEX_DTYPE, lengths.get(name, metadata["rows"]))
        for name in PLAN_ARRAYS
    )
    return SampleRows(
        store, plan, recipe.seq_length, recipe.pad_token, packed=recipe.section.packing
    )


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    try:
        _open(folder, recipe)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _metadata(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return metadata


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the content of a folder of the cache, apart from the files' own content."""
    loader, tokenizer = recipe.section.data_loader, recipe.tokenizer
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
        # A stream is cut when it is read, so that one folder serves every length.
        "seq_length": None if recipe.is_stream else recipe.seq_length,
        "tokenizer": _tokenizer_hash(tokenizer),
        "chat_template": getattr(tokenizer, "chat_template", None) or DEFAULT_CHAT_TEMPLATE,
    }


def _tokenizer_hash(tokenizer: Any) -> str:
    if getattr(tokenizer, "is_fast", False):
        content = backend_of(tokenizer).to_str()
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return _hash([content, tokenizer.eos_token_id, str(tokenizer.special_tokens_map)])


def _hash(value: Any) -> str:
    return xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plan_warnings(plan: RowPlan, recipe: Recipe) -> list[str]:
    if not plan.cut:
        return []
    return [f"warning: {plan.cut} sample(s) longer than seq_length {recipe.seq_length} were cut"]


def _nothing_to_learn(recipe: Recipe, files: list[DataFile], metadata: dict[str, Any]) -> UserError:
    shown = ", ".join(repr(path) for path in recipe.section.data_loader.paths)
    return UserError(
        f"data_loader: {shown} has nothing to learn from ({len(files)} file(s), "
        f"{metadata['read']} document(s), {metadata['tokens']} token(s))",
        rule="a dataset needs at least two tokens of text, or one answer that fits into a row",
        nearest=f"The first file is {files[0].path}",
        advice="; ".join(metadata["warnings"]) or "Look into the files",
    )


def _remove_leftovers(cache_dir: Path) -> None:
    """Scratch folders of runs that were killed long ago."""
    for leftover in cache_dir.glob(".*.tmp"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
