"""From a dataset section to the rows of a stream.

Owns the folder of a stream in the data cache, `stream-<key>`: the journal, and the ring of each
job. The key, and the content that a resume compares, are those of what decides the rows: the
shards, in their order, the settings, the tokenizer. Where the shards are is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher.config.schema import DatasetSection
from launcher.data.build import Once
from launcher.data.cache_key import hash_of, settings_of
from launcher.data.chat_rendering import ChatSettings
from launcher.data.loaders import loader_of
from launcher.data.loaders.base import Log, Recipe
from launcher.data.rows import RowDataset
from launcher.data.streaming.index import ShardIndex, index_source
from launcher.data.streaming.producer import Production
from launcher.data.streaming.ring import OwnedRing, Ring
from launcher.data.streaming.rows import Journal, Producer, StreamingRows
from launcher.data.streaming.shards import find_shards
from launcher.data.streaming.worker import start_producer
from launcher.errors import UserError

STREAM_VERSION = 1
"""Part of every key: raise it when the same shards would give other rows."""
StartProducer = Callable[[Production, Log], Producer]


@dataclass(frozen=True, kw_only=True)
class MachineRanks:
    """The ranks that share a machine, and this one among them."""

    once: Once
    """Runs a function on the first of them and returns its result on each."""
    number: int = 0
    """Of this rank among them; 0 leads."""
    count: int = 1


def build_stream(
    section: DatasetSection,
    *,
    tokenizer: Any,
    seq_length: int,
    cache_dir: Path,
    seed: int,
    once: Once,
    machine: MachineRanks,
    log: Log,
    model_config: Mapping[str, Any] | None = None,
    chat: ChatSettings | None = None,
    on_progress: Log = lambda line: None,
    start: StartProducer = start_producer,
) -> RowDataset:
    """The endless rows of a section with `streaming`, in the order of `seed`.

    As `build_dataset`, every rank calls this with the same arguments; `machine` has the ranks that
    share one producer. The order is part of the rows: sample n of the run is row n. Raises
    UserError, the same on every rank.
    """
    recipe = Recipe(
        section=section, tokenizer=tokenizer, seq_length=seq_length, cache_dir=Path(cache_dir),
        log=log, model_config=model_config or {}, chat=chat or ChatSettings(),
    )  # fmt: skip
    indexed = cache(lambda: _indexed(recipe, on_progress))
    content = once(lambda: indexed()[1])
    parent = recipe.cache_dir / f"stream-{hash_of([content, seed, recipe.loader.is_shuffled])}"
    owned: list[OwnedRing] = []

    def make_ring() -> str:
        try:
            owned.append(OwnedRing(parent))
        except OSError as error:
            raise _not_written(recipe, error) from error
        return owned[0].folder.name

    ring = Ring(parent / machine.once(make_ring))

    def started() -> Producer:
        production = Production(
            section=section, tokenizer=tokenizer, seq_length=seq_length,
            model_config=recipe.model_config, chat=recipe.chat, source=indexed()[0], seed=seed,
            ring=ring.folder, readers=machine.count,
        )  # fmt: skip
        return start(production, log)

    leads = machine.number == 0
    rows = StreamingRows(
        ring, machine.number, recipe, Journal(parent / "journal"), started if leads else None,
        owned[0].close if owned else None,
    )  # fmt: skip
    return RowDataset(
        rows=rows,
        seq_length=seq_length,
        packed=section.packing,
        content=content,
        settings={"streaming": True, "shuffle_buffer": recipe.loader.shuffle_buffer},
        name="the stream",
    )


def _indexed(recipe: Recipe, on_progress: Log) -> tuple[list[ShardIndex], str]:
    """The source, and the hash of all that decides its rows."""
    loader = recipe.loader
    shards = find_shards(loader)

    def report(line: str) -> None:
        recipe.log(line)
        on_progress(line)

    try:
        source = index_source(
            shards, loader.shuffle_buffer, loader.num_samples, recipe.cache_dir, report
        )
    except OSError as error:
        raise _not_written(recipe, error) from error
    records = sum(index.records for index in source)
    if not records:
        raise UserError(
            f"data_loader: {len(shards)} file(s) have no record",
            rule="a dataset needs at least one record",
            nearest=f"The first file is {shards[0].name}",
        )
    blocks = sum(len(index.blocks) for index in source)
    recipe.log(
        f"data: streaming {records:,} {loader_of(loader).unit} of {len(source):,} file(s), "
        f"in {blocks:,} block(s) of at most {loader.shuffle_buffer:,}"
    )
    settings = settings_of(recipe) | {"stream": STREAM_VERSION, "block": loader.shuffle_buffer}
    settings |= {"seq_length": recipe.seq_length}
    return source, hash_of([settings, [index.content for index in source]])


def _not_written(recipe: Recipe, error: OSError) -> UserError:
    return UserError(
        f"the data cache cannot be written ({error.strerror or error})",
        where=str(error.filename or recipe.cache_dir),
        rule="blocks of a stream are kept in a folder that this user may write to",
        advice="Free some space, give write permission, or set another output_dir",
    )
