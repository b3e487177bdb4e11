"""InstructionDataLoader: each record is a conversation; loss is computed on its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.config.schema import DataLoaderSection
from launcher.data.chat import tokenize_conversations
from launcher.data.conversations import (
    Conversation,
    conversations_of_file,
    conversations_of_records,
)
from launcher.data.loaders.base import DataLoader, FromRecords, Recipe, TokenBatch
from launcher.data.loaders.text_column import find_record_files
from launcher.data.records import Record
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import UserError


def _read_file(
    path: Path, section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Conversation]:
    """The format is `data_loader.format`, else that of the first record of the file."""
    strictness = Strictness(strict=section.strict_fields, tally=tally)
    return conversations_of_file(path, section.format, cache_dir, strictness)


def _conversations(
    records: Iterable[Record | UserError],
    section: DataLoaderSection,
    tally: Tally,
    first: Record | None,
) -> Iterator[Conversation]:
    strictness = Strictness(strict=section.strict_fields, tally=tally)
    return conversations_of_records(records, section.format, strictness, first)


def _tokenize(
    conversations: Iterable[Conversation], recipe: Recipe, tally: Tally
) -> Iterator[TokenBatch]:
    strictness = Strictness(strict=recipe.loader.strict_fields, tally=tally)
    for samples in tokenize_conversations(
        conversations, recipe.tokenizer, recipe.log, strictness, recipe.seq_length
    ):
        yield TokenBatch([s.tokens for s in samples], [s.is_target for s in samples])


INSTRUCTION_LOADER = DataLoader(
    find_files=find_record_files,
    read_file=_read_file,
    tokenize=_tokenize,
    has_targets=True,
    from_records=FromRecords(samples=_conversations),
    unit="conversations",
    paths_key="dataset_files",
)
