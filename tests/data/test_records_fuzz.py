"""Damaged records end in a result or in an error with file and place; nothing is lost between."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataLoaderSection
from launcher.data.chat import tokenize_conversations
from launcher.data.fields import METADATA, WEIGHTS
from launcher.data.loaders import read_samples, source_files
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import UserError

from .conftest import CHATML, train_tokenizer
from .mutations import RAW, mutated, write

WITH_TOOLS = CHATML.replace(
    "{%- for message",
    "{%- if tools -%}{{- tools | tojson -}}{%- endif -%}{%- for message",
).replace(
    "message['content'] + ",
    "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') "
    "+ (message.name if message.name else '') + ",
)


@cache
def tokenizer_with(template: str) -> Any:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def texts_in(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Every text in a record with the names that lead to it."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in texts_in(inner, (*path, key))]
    if isinstance(value, list):
        return [found for inner in value for found in texts_in(inner, path)]
    return [(path, value)] if isinstance(value, str) else []


def check_error(error: UserError, path: Path) -> None:
    for problem in error.problems:
        assert str(path) in f"{problem.where} {problem.what}", problem
        str(problem).encode()  # printable on every console and into every log
    assert len(error.problems) <= 40


def check_nothing_is_lost(record: dict[str, Any], shown: str, tally: Tally) -> None:
    """Every text of the record is in the tokens, or its field is counted or known as metadata."""
    places = (tally.unused_fields, tally.hidden_fields, tally.skipped_checks)
    names = [name for found in places for name in found.by_name]
    counted = {name.rpartition("].")[2] for name in names} | {name.split(" ")[0] for name in names}
    no_log = METADATA | set(WEIGHTS) | {"role", "from", "text"}
    for path, text in texts_in(record):
        is_raw = text.startswith(RAW) or "tools" in path or "tool_calls" in path
        if path and not is_raw and not no_log & set(path) and not counted & set(path):
            assert text.strip() in shown, (path, text)


def read_damaged(seed: int, folder: Path) -> str:
    """Read one damaged file as instruction data and check the result, which is returned."""
    form, suffix, records, choose = mutated(seed)
    path = folder / f"{seed}{suffix}"
    written = write(path, records, choose)
    if not written:
        return "not written"
    loader = DataLoaderSection(
        type="InstructionDataLoader",
        dataset_files=[str(path)],
        format=choose.choice((None, form)),
        strict_fields=choose.random() < 0.7,
    )
    tokenizer = tokenizer_with(choose.choice((CHATML, WITH_TOOLS)))
    tally = Tally()
    strictness = Strictness(strict=loader.strict_fields, tally=tally)
    try:
        found = list(read_samples(loader, source_files(loader), folder / "cache", tally))
        batches = list(tokenize_conversations(found, tokenizer, lambda _: None, strictness, 10**6))
        samples = [sample for batch in batches for sample in batch]
    except UserError as error:
        check_error(error, path)
        return "error"
    assert len(samples) == len(found) == tally.documents
    assert sum(not s.is_target[1:].any() for s in samples) == tally.without_target.count
    for line in tally.warnings(64):
        line.encode()
    if written == "as it is":
        shown = tokenizer.decode(samples[1].tokens)
        check_nothing_is_lost(records[1], shown, tally)
    return "result"


def read_column(seed: int, folder: Path) -> str:
    """Read one damaged file as documents of one column."""
    _, suffix, records, choose = mutated(seed)
    path = folder / f"column{seed}{suffix}"
    written = write(path, records, choose)
    if not written:
        return "not written"
    column = choose.choice(list(records[0]))
    loader = DataLoaderSection(type="HFDataLoader", dataset_files=[str(path)], text_column=column)
    tally = Tally()
    try:
        found = list(read_samples(loader, source_files(loader), folder / "cache", tally))
    except UserError as error:
        check_error(error, path)
        return "error"
    tokenizer_with(CHATML)([document.text for document in found] or [""])
    if written == "as it is":
        assert found[0].text == records[0][column]
    return "result"


def outcomes_of(seeds: range, folder: Path) -> set[str]:
    found = {read_damaged(seed, folder) for seed in seeds}
    return found | {read_column(seed, folder) for seed in seeds if seed % 4 == 0}


def test_a_sample_of_damaged_files(tmp_path: Path) -> None:
    assert {"error", "result"} <= outcomes_of(range(200), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("start", range(1000, 5000, 1000))
def test_many_damaged_files(tmp_path: Path, start: int) -> None:
    assert {"error", "result"} <= outcomes_of(range(start, start + 1000), tmp_path)
