"""Samples of the data of a configuration, decoded, with marks around what carries loss.

`--show_data` prints them alone, `launcher.tools.inspect_data` behind its numbers. Data are prepared
as a run prepares them, into the same cache; there is no model and no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.builders.data import TrainingData, opened
from launcher.builders.job import Job
from launcher.config.derived import has_tokenizer, used_datasets, uses_named_tokenizer
from launcher.data.decoded_rows import DecodedDocument, Piece, decoded_documents, sequences_of
from launcher.data.rows import NO_TARGET
from launcher.environment import process_environment
from launcher.errors import EXIT_OK

SHOWN_CHARACTERS = 240
"""Of the beginning of a long piece, and of its end."""


@dataclass(frozen=True)
class Marks:
    """What is written around text that carries loss."""

    begin: str
    end: str
    is_color: bool = False

    @property
    def legend(self) -> str:
        """One line that explains them."""
        shown = f"{self.begin}text{self.end}"
        return f"{shown} carries loss" + (", other text is context" if self.is_color else "")


PLAIN = Marks("{+", "+}")
"""As in a word diff."""
GREEN = Marks("\033[32m", "\033[0m", is_color=True)


def show_data(job: Job, count: int) -> int:
    """Print `count` samples of each data section that the configuration uses, in the order of a
    run. Started as several processes, the first one does it."""
    if process_environment().rank != 0:
        return EXIT_OK
    for name, section in used_datasets(job.config).items():
        data = opened(job, name, section)
        try:
            job.log(f"{name}:")
            for line in sample_lines(job, data, count):
                job.log(line)
        finally:
            if data.dataset.stream is not None:
                data.dataset.stream.close()
    return EXIT_OK


def marks_of(job: Job) -> Marks:
    """Color on a terminal, unless NO_COLOR is set (no-color.org) or the terminal has none."""
    has_color = job.console.live and os.environ.get("TERM") != "dumb"
    return GREEN if has_color and not os.environ.get("NO_COLOR") else PLAIN


def sample_lines(job: Job, data: TrainingData, count: int) -> Iterator[str]:
    """The first samples of a run over `data`: for each its counts and its documents, decoded where
    there is a tokenizer."""
    folder = job.tokenizer_dir
    is_known = uses_named_tokenizer(job.config) or (folder and has_tokenizer(folder))
    tokenizer = job.tokenizer if is_known else None
    marks, is_explained = marks_of(job), False
    for number in range(min(count, len(data.dataset))):
        sample = _sample(data, number, tokenizer)
        if sample.has_context and not is_explained:
            is_explained = True
            yield marks.legend
        yield sample.head
        yield from _sequences(sample, marks if sample.has_context else Marks("", ""))


@dataclass(frozen=True)
class _Sample:
    """A decoded row: its line of counts, and the documents of each of its sequences by name."""

    head: str
    sequences: list[tuple[str, list[DecodedDocument]]]

    @property
    def has_context(self) -> bool:
        """Whether a part of it carries no loss; answers that are compared always follow one."""
        return any(
            name or document.has_context for name, found in self.sequences for document in found
        )


def _sample(data: TrainingData, number: int, tokenizer: Any) -> _Sample:
    dataset = data.dataset
    index = int(data.order.rows([number])[0])
    in_row = int(dataset.counts(np.array([index], dtype=np.int64)).tokens[0])
    sequences = sequences_of(dataset.row(index), in_row)
    tokens = sum(inputs for _, _, inputs in sequences)
    targets = sum(int((row.labels != NO_TARGET).sum()) for _, row, _ in sequences)
    decoded = [
        (name, list(decoded_documents(row, inputs, tokenizer))) for name, row, inputs in sequences
    ]
    documents = sum(len(found) for _, found in decoded)
    padding = len(sequences) * dataset.seq_length - tokens
    head = (
        f"sample {number} ({_place(data, index)}): {tokens:,} tokens, {targets:,} targets, "
        f"{documents:,} document{'' if documents == 1 else 's'}, {padding:,} padding"
    )
    return _Sample(head, decoded)


def _sequences(sample: _Sample, marks: Marks) -> Iterator[str]:
    for name, documents in sample.sequences:
        yield from [f"  {name}:"] if name else []
        for place, document in enumerate(documents):
            yield from ["  |---"] if place else []
            yield from _lines(document, marks)


def _place(data: TrainingData, index: int) -> str:
    """The row of a sample; of a mixture that of its source."""
    sources = data.dataset.sources
    if not sources:
        return f"row {index}"
    number = int(data.dataset.source_of(np.array([index], dtype=np.int64))[0])
    before = sum(source.rows for source in sources[:number])
    return f"row {index - before} of {sources[number].name}"


def _lines(document: DecodedDocument, marks: Marks) -> Iterator[str]:
    """The lines of a document, each with its marks closed where they are colors."""
    text = "".join(_marked(document.pieces, marks))
    if document.tokens_left:
        text += f" ... ({document.tokens_left:,} more tokens)"
    yield from (f"  | {line}" for line in text.split("\n"))


def _marked(pieces: Iterable[Piece], marks: Marks) -> Iterator[str]:
    for piece in pieces:
        text = _without_control(_shortened(piece.text))
        if piece.is_learnt and text:
            if marks.is_color:  # a color ends with its line, for pagers and prefixes
                text = text.replace("\n", f"{marks.end}\n{marks.begin}")
            text = f"{marks.begin}{text}{marks.end}"
        yield text


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    return (
        f"{text[:SHOWN_CHARACTERS]} ... ({left_out:,} more characters) ... "
        f"{text[-SHOWN_CHARACTERS:]}"
    )


def _without_control(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return "".join(
        char.encode("unicode_escape").decode() if _is_control(char) and char not in "\n\t" else char
        for char in text
    )


def _is_control(char: str) -> bool:
    """Of C0 and C1, or one that turns the direction of text."""
    return ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or 0x202A <= ord(char) <= 0x202E
