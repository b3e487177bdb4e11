"""From data files to the arrays of a token store, in one process or several.

Owns when several processes are worth their start, and the order in which counts are added up.
Invariant: the files that are written, the counts and the errors do not depend on the number of
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.data.chunks import Chunk, EncodedChunk, chunks_of, encode
from launcher.data.files import DataFile
from launcher.data.loaders import loader_of, read_samples
from launcher.data.loaders.base import Recipe
from launcher.data.progress import Meter, counting_bytes
from launcher.data.store import TokenWriter
from launcher.data.tally import Tally
from launcher.data.workers import CannotStart, Workers

SLOW_BYTES = 16_000_000
FAST_BYTES = 64_000_000
"""Data from which several processes are used. A process takes seconds to start, in which Python
renders and tokenizes some megabytes, and a tokenizer in Rust, which has threads, far more."""
FEW_SAMPLES = 10_000


def tokenize_files(
    folder: Path, recipe: Recipe, files: list[DataFile], tally: Tally
) -> dict[str, Any]:
    """Read and tokenize `files` into the store in `folder`; what is left out is counted in `tally`.

    Returns the metadata for `open_store`. Raises UserError, and OSError of the folder.
    """
    total = sum(file.size for file in files)
    writer = TokenWriter(folder, with_targets=loader_of(recipe.loader).has_targets)
    meter = Meter("tokenize", total, recipe.on_progress)
    logged: set[str] = set()
    try:
        with counting_bytes(meter):
            for chunk, encoded in encoded_chunks(recipe, files, total, meter.tick):
                tally.merge(chunk.counted)
                tally.merge(encoded.tally)
                writer.add_arrays(encoded.lengths, encoded.tokens, encoded.targets)
                for line in encoded.lines:
                    if line not in logged:
                        logged.add(line)
                        recipe.log(line)
                meter.tokens = writer.tokens
                meter.tick()
        return writer.finish()
    finally:
        writer.close()


def worker_count(recipe: Recipe, total_bytes: int) -> int:
    """Processes that tokenize data of this size; 1: this one alone."""
    samples = recipe.loader.num_samples
    is_fast = getattr(recipe.tokenizer, "is_fast", False)
    is_slow = loader_of(recipe.loader).has_targets or not is_fast
    is_small = total_bytes < (SLOW_BYTES if is_slow else FAST_BYTES)
    if is_small or (samples is not None and samples < FEW_SAMPLES):
        return 1
    return recipe.workers


def encoded_chunks(
    recipe: Recipe, files: list[DataFile], total: int, tick: Callable[[], None], *, skip: int = 0
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """The samples of `files`, of `total` bytes, after the first `skip`, and their tokens, in order;
    `tick` is called now and then. Raises UserError."""
    counted = Tally()
    samples = read_samples(recipe.loader, files, recipe.cache_dir, counted)
    chunks = chunks_of(islice(samples, skip, None), recipe, counted)
    count = worker_count(recipe, total)
    if count > 1:
        try:
            workers = Workers(count, recipe)
        except CannotStart as error:
            recipe.log(_in_one_process(error))
        else:
            try:
                yield from workers.map(chunks, tick)
                return
            finally:
                workers.close()
    for chunk in chunks:
        yield chunk, encode(chunk.samples, recipe)


def _in_one_process(reason: CannotStart) -> str:
    return f"note: one process tokenizes, as the tokenizer cannot be sent to others ({reason})"
