"""Alpaca records in prompts of fixed text, tokenized in parts, instead of a chat template.

Owns how such a prompt becomes tokens and targets; `launcher.extensions.PROMPT_TEMPLATES` has the
templates. Invariants: the parts are tokenized one by one, each with the special tokens that the
tokenizer adds to a text, and joined; the tokens of the answer are targets, all others are context.
Labels are shifted once, when rows are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from launcher.data.chat import Sample, count_without_targets
from launcher.data.records import Record, convert_records, kind_of
from launcher.data.strictness import Strictness, names_of, surrogate_error, wrong_field
from launcher.data.tally import Tally
from launcher.data.tokens import backend_of
from launcher.errors import UserError
from launcher.extensions import PROMPT_TEMPLATES, required
from launcher.json_text import lone_surrogate

INSTRUCTION_FIELDS = ("instruction", "input", "output")
_BATCH = 256
_UNUSED = ("text",)
"""The formatted prompt that data sets of the hub repeat in each record."""


class Prompt(NamedTuple):
    """One record in a prompt: the parts that are context, then the answer."""

    where: str
    context: tuple[str, ...]
    answer: str


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a record with instruction, input and output is written."""

    context: Callable[[Mapping[str, str]], tuple[str, ...]]
    """The parts before the answer, of the fields instruction and input (empty where absent)."""
    answer: Callable[[str], str]
    """The answer, of the field output."""
    end: str = ""
    """Text that ends an answer, which should be one token."""
    note: str = ""
    """What to log about it."""


def template_of(name: str) -> PromptTemplate:
    """The template of this name. Raises UserError where the package that has it was removed."""
    found: PromptTemplate = required(PROMPT_TEMPLATES, name, f"data_loader.prompt_template: {name}")
    return found


def prompts_of(
    records: Iterable[Record | UserError], template: PromptTemplate, strictness: Strictness
) -> Iterator[Prompt]:
    """The prompts of alpaca records. Raises UserError for records of another form."""

    def prompt_of(record: Record) -> Prompt:
        fields = {name: _text(record, name, strictness) for name in INSTRUCTION_FIELDS}
        used = (*INSTRUCTION_FIELDS, *_UNUSED)
        strictness.check_fields(record, record.value, used)
        answer = template.answer(fields["output"])
        return Prompt(record.where, template.context(fields), answer)

    return convert_records(records, prompt_of)


def _text(record: Record, name: str, strictness: Strictness) -> str:
    value = record.value.get(name)
    if isinstance(value, str):
        if wrong := lone_surrogate(value):
            raise surrogate_error(record.where, name, wrong)
        return value
    if value is None and name == "input":
        return ""
    if name in record.value and name == "input":
        error = wrong_field(record.where, name, value, "it must be a string")
        strictness.wrong(error, name, record.where)
        return ""
    raise UserError(
        f"{name!r} is {kind_of(value)}" if name in record.value else f"{name!r} is missing",
        where=record.where,
        rule="prompt_template is filled with the strings instruction, input (optional) and output",
        nearest=f"Keys found: {names_of(record.value)}",
        advice="Name the columns in data_loader.column_map, or fix the record",
    )


def tokenize_prompts(
    prompts: Iterable[Prompt],
    template: PromptTemplate,
    tokenizer: Any,
    log: Callable[[str], None],
    tally: Tally,
    seq_length: int | None,
) -> Iterator[list[Sample]]:
    """The samples of prompts, in batches, in order.

    Samples without a target in a row of `seq_length` tokens are counted in `tally`.
    """
    if template.note:
        log(f"note: {template.note}")
    if template.end and not _is_token(template.end, tokenizer):
        log(
            f"note: the prompt template ends answers with the text {template.end!r}, which is no "
            "token of this tokenizer: generation will not stop there by itself"
        )
    iterator = iter(prompts)
    while batch := list(islice(iterator, _BATCH)):
        texts = [part for prompt in batch for part in (*prompt.context, prompt.answer)]
        encoded = iter(_encode(texts, tokenizer))
        samples = []
        for prompt in batch:
            context = [token for _ in prompt.context for token in next(encoded)]
            answer = next(encoded)
            is_target = np.zeros(len(context) + len(answer), dtype=bool)
            is_target[len(context) :] = True
            sample = Sample(tokens=context + answer, is_target=is_target)
            count_without_targets(sample, prompt.where, tally, seq_length)
            samples.append(sample)
        yield samples


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts, each with the special tokens that the tokenizer adds."""
    if getattr(tokenizer, "is_fast", False):
        encodings = backend_of(tokenizer).encode_batch(texts, add_special_tokens=True)
        return [encoding.ids for encoding in encodings]
    encoded: list[list[int]] = tokenizer(texts)["input_ids"]
    return encoded


def _is_token(text: str, tokenizer: Any) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
