"""InstructionDataLoader: each record is a conversation; loss is computed on its answers.

A conversation is rendered by the chat template of the tokenizer or, with `prompt_template`, put
into a prompt of fixed text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.config.schema import DataLoaderSection
from launcher.data.chat import tokenize_conversations
from launcher.data.conversations import Conversation, conversations_of
from launcher.data.files import DataFile
from launcher.data.learnt import learnt_turns
from launcher.data.loaders.base import DataLoader, FromRecords, Recipe, TokenBatch
from launcher.data.prompts import Prompt, prompts_of, template_of, tokenize_prompts
from launcher.data.record_files import find_record_files, records_of_file, records_of_files
from launcher.data.records import Record
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import UserError

Sample = Conversation | Prompt


def _read_file(
    path: Path, section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Sample]:
    """The format is `data_loader.format`, else that of the first record of the file."""
    return _samples(records_of_file(path, section, cache_dir), section, tally)


def _read_files(
    files: list[DataFile], section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Sample]:
    return _samples(records_of_files(files, section, cache_dir), section, tally)


def _samples(
    records: Iterable[Record | UserError],
    section: DataLoaderSection,
    tally: Tally,
    first_record: Record | None = None,
) -> Iterator[Sample]:
    """The samples of records; `first_record`: the first one of their file, where it is not among
    them."""
    strictness = Strictness(strict=section.strict_fields, tally=tally)
    if section.prompt_template:
        return prompts_of(records, template_of(section.prompt_template), strictness)
    learnt = learnt_turns(section)
    return conversations_of(records, section.format, strictness, first_record, learnt)


def _tokenize(samples: Iterable[Sample], recipe: Recipe, tally: Tally) -> Iterator[TokenBatch]:
    strictness = Strictness(strict=recipe.loader.strict_fields, tally=tally)
    # A stream has no rows yet, and continues a long sample in the next one.
    is_stream = recipe.section.packing_strategy == "concatenate"
    seq_length = None if is_stream else recipe.seq_length
    if recipe.loader.prompt_template:
        prompts = (sample for sample in samples if isinstance(sample, Prompt))
        template = template_of(recipe.loader.prompt_template)
        found = tokenize_prompts(prompts, template, recipe.tokenizer, recipe.log, tally, seq_length)
    else:
        conversations = (sample for sample in samples if isinstance(sample, Conversation))
        found = tokenize_conversations(
            conversations, recipe.tokenizer, recipe.log, strictness, seq_length, recipe.chat
        )
    for batch in found:
        kept = [s for s in batch if s.is_target[1:].any()] if is_stream else batch
        if kept:
            yield TokenBatch([s.tokens for s in kept], [s.is_target for s in kept])


INSTRUCTION_LOADER = DataLoader(
    find_files=find_record_files,
    read_file=_read_file,
    read_files=_read_files,
    tokenize=_tokenize,
    from_records=FromRecords(samples=_samples),
    has_targets=True,
    unit="conversations",
    paths_key="dataset_files",
)
