"""Alpaca records in the prompts of MindFormers: equal tokens, labels that are shifted once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from launcher.errors import UserError
from tests.data.conftest import Build, train_tokenizer

RECORDS = [
    {"instruction": "Name a ramp.", "input": "", "output": "The slipway."},
    {"instruction": "What is it?", "input": "a slipway", "output": "It is a ramp for ships."},
    {"instruction": "Say nothing.", "output": "Ship."},
]
CUTS = {"all": 900, "cut in an answer": 330}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def alpaca_parts(record: dict[str, str]) -> list[tuple[str, bool]]:
    """The texts that AlpacaInstructDataHandler tokenizes, and whether their labels count."""
    about = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    if record.get("input"):
        asked = (
            f"{about}, paired with an input that provides further context. {request}"
            f"{record['instruction']}\n\n### Input:\n{record['input']}\n\n### Response:"
        )
    else:
        asked = f"{about}. {request}{record['instruction']}\n\n### Response:"
    answer = f"ASSISTANT: {record['output']}</s>"
    return [(f"{SYSTEM} ", False), (f"USER: {asked} ", False), (answer, True)]


def code_parts(record: dict[str, str]) -> list[tuple[str, bool]]:
    asked = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{record['instruction']}\n\n"
        f"### Input:\n{record.get('input', '')}\n\n### Response:\n"
    )
    return [(asked, False), (record["output"], True)]


PARTS = {"mindformers_alpaca": alpaca_parts, "mindformers_code_alpaca": code_parts}


def handler_row(
    parts: list[tuple[str, bool]], tokenizer: Any, seq_length: int
) -> tuple[list[int], list[int]]:
    """ids and labels as AlpacaInstructDataHandler makes them: parts joined, labels shifted by one,
    both padded and cut to seq_length."""
    ids: list[int] = []
    labels: list[int] = []
    for text, counts in parts:
        tokens = tokenizer(text)["input_ids"]
        ids += tokens
        labels += tokens if counts else [-100] * len(tokens)
    labels = [*labels[1:], -100]
    room = max(0, seq_length - len(ids))
    pad = tokenizer.pad_token_id or 0
    return (ids + [pad] * room)[:seq_length], (labels + [-100] * room)[:seq_length]


def with_bos() -> Any:
    """A tokenizer that begins every text with a token, as that of Llama."""
    made = train_tokenizer(bos_token="<|im_start|>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A",
        special_tokens=[("<|im_start|>", made.convert_tokens_to_ids("<|im_start|>"))],
    )
    return made


def with_end() -> Any:
    made = train_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["</s>"]})
    return made


TOKENIZERS = {"plain": train_tokenizer, "adds BOS": with_bos, "has </s>": with_end}


def write(folder: Path, records: list[dict[str, Any]] = RECORDS) -> str:
    path = folder / "alpaca.json"
    path.write_text(json.dumps(records))
    return str(path)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", PARTS)
def test_tokens_and_labels_are_those_of_the_handler(
    name: str, cut: str, kind: str, tmp_path: Path, build: Build, logged: list[str]
) -> None:
    tokenizer, seq_length = TOKENIZERS[kind](), CUTS[cut]
    dataset = build(
        type="InstructionDataLoader", dataset_files=write(tmp_path), prompt_template=name,
        tokenizer=tokenizer, seq_length=seq_length, packing=False,
    )  # fmt: skip
    expected = [handler_row(PARTS[name](record), tokenizer, seq_length) for record in RECORDS]
    expected = [row for row in expected if set(row[1]) != {-100}]
    assert len(dataset) == len(expected)
    for index, (ids, labels) in enumerate(expected):
        row = dataset.row(index)
        assert row.labels.tolist() == labels
        last = max(np.flatnonzero(np.array(labels) != -100))
        assert row.input_ids[: last + 1].tolist() == ids[: last + 1]
    has_note = any("generation will not stop" in line for line in logged)
    assert has_note == (name == "mindformers_alpaca" and kind != "has </s>")
    assert any("shifted once" in line for line in logged)
    left_out = len(RECORDS) - len(expected)
    assert any(f"{left_out} sample(s) with no answer within" in line for line in logged) == (
        left_out > 0
    )


def test_packed_labels_are_shifted_once(tmp_path: Path, build: Build) -> None:
    """Not twice, as by an alpaca handler and a PackingHandler after it."""
    tokenizer = train_tokenizer()
    dataset = build(
        type="InstructionDataLoader", dataset_files=write(tmp_path), tokenizer=tokenizer,
        prompt_template="mindformers_alpaca", seq_length=2000, packing=True,
    )  # fmt: skip
    (row,) = (dataset.row(index) for index in range(len(dataset)))
    targets = [t for record in RECORDS for t in tokenizer(alpaca_parts(record)[2][0])["input_ids"]]
    kept = np.flatnonzero(row.labels != -100)
    assert row.labels[kept].tolist() == targets
    inside = kept[np.isin(kept + 1, kept)]
    assert (row.labels[inside] == row.input_ids[inside + 1]).all()
    assert row.document_ids is not None
    assert len(set(row.document_ids[kept])) == 3


def rows_of(dataset: Any) -> list[tuple[list[int], list[int]]]:
    return [
        (row.input_ids.tolist(), row.labels.tolist())
        for row in map(dataset.row, range(len(dataset)))
    ]


@pytest.mark.parametrize("seq_length", [7, 64, 150, 5000])
def test_samples_that_are_concatenated_are_one_stream(
    seq_length: int, tmp_path: Path, build: Build
) -> None:
    """Every target is predicted once, whatever the rows; a row without one is left out."""
    tokenizer = train_tokenizer()
    dataset = build(
        type="InstructionDataLoader", dataset_files=write(tmp_path), tokenizer=tokenizer,
        prompt_template="mindformers_alpaca", seq_length=seq_length, packing=True,
        packing_strategy="concatenate",
    )  # fmt: skip
    parts = [(tokenizer(text)["input_ids"], counts)
             for record in RECORDS for text, counts in alpaca_parts(record)]  # fmt: skip
    stream = [token for tokens, _ in parts for token in tokens]
    labels = [token if counts else -100 for tokens, counts in parts for token in tokens][1:]
    expected = []
    for begin in range(0, len(stream) - 1, seq_length):
        cut = labels[begin : begin + seq_length]
        if set(cut) != {-100}:
            ids = stream[begin : begin + seq_length]
            pad = [tokenizer.pad_token_id] * (seq_length - len(ids))
            expected.append((ids + pad, cut + [-100] * (seq_length - len(cut))))
    assert rows_of(dataset) == expected
    counts = dataset.counts(np.arange(len(dataset)))
    assert counts.targets.tolist() == [sum(t != -100 for t in cut) for _, cut in expected]


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no output": ({"instruction": "a", "answer": "b"}, ["'output' is missing", "answer"]),
    "output is a number": ({"instruction": "a", "output": 1}, ["'output' is a number"]),
    "a conversation": ({"messages": []}, ["'instruction' is missing", "messages"]),
    "half a surrogate": ({"instruction": "\ud800", "output": "b"}, ["instruction", "surrogate"]),
    "preferences": ({"instruction": "a", "output": "b", "rejected": "c"}, ["'rejected'"]),
    "input is a list": ({"instruction": "a", "output": "b", "input": ["c"]}, ["'input'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_records_that_do_not_fit(case: str, tmp_path: Path, build: Build) -> None:
    record, words = WRONG[case]
    path = write(tmp_path, [RECORDS[0], record])
    with pytest.raises(UserError) as error:
        build(type="InstructionDataLoader", dataset_files=path,
              prompt_template="mindformers_alpaca", packing=False)  # fmt: skip
    assert "record 2" in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_fields_that_a_prompt_has_no_place_for_are_named(
    tmp_path: Path, build: Build, logged: list[str]
) -> None:
    path = write(tmp_path, [{**RECORDS[0], "system": "Be kind.", "history": [["a", "b"]]}])
    build(type="InstructionDataLoader", dataset_files=path, seq_length=900, packing=False,
          prompt_template="mindformers_alpaca")  # fmt: skip
    (line,) = (line for line in logged if "not used" in line)
    assert "`system`" in line
    assert "`history`" in line
