"""From files to rows: what is logged, what the cache keeps, what other ranks get."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.rows import RowDataset
from launcher.errors import UserError

from .conftest import Build, train_tokenizer


def all_inputs(dataset: RowDataset) -> list[int]:
    rows = [dataset.row(index) for index in range(len(dataset))]
    return [
        token
        for row, count in zip(rows, dataset.counts(np.arange(len(dataset))).tokens, strict=True)
        for token in row.input_ids[:count].tolist()
    ]


def test_packed_text_is_the_stream_of_all_documents(
    build: Build, corpus: Path, tokenizer: Any, logged: list[str]
) -> None:
    dataset = build(dataset_dir=str(corpus), seq_length=16)
    names = ["1.txt", "3.txt", "5.txt", *(f"deep/er/{n}.txt" for n in (0, 2, 4, 6))]
    stream = [t for n in names for t in [*tokenizer((corpus / n).read_text())["input_ids"], 0]]
    assert all_inputs(dataset) == stream
    assert dataset.total_targets() == len(stream) - len(names)
    assert dataset.largest_token == max(stream)
    assert len(logged) == 1
    assert logged[0].startswith(
        f"data: 7 documents of 7 file(s), {len(stream):,} tokens, {len(dataset)} rows of 16 ("
    )
    assert logged[0].endswith(" s)")


def test_padded_text_is_a_document_per_row_and_cuts_are_logged(
    build: Build, corpus: Path, tokenizer: Any, logged: list[str]
) -> None:
    dataset = build(dataset_dir=str(corpus), seq_length=16, packing=False)
    assert len(dataset) == 7
    first = [*tokenizer((corpus / "deep/er/0.txt").read_text())["input_ids"], 0]
    row = dataset.row(3)
    missing = 16 - (len(first) - 1)
    assert row.input_ids.tolist() == first[:-1] + [tokenizer.pad_token_id] * missing
    assert row.labels.tolist() == first[1:] + [-100] * missing
    assert row.document_ids is None
    lengths = [len(tokenizer(path.read_text())["input_ids"]) for path in corpus.rglob("*.txt")]
    cut = sum(length > 16 for length in lengths)
    assert cut == 4
    assert logged[1:] == ["warning: 4 sample(s) longer than seq_length 16 were cut"]


def test_instruction_rows_learn_answers_only(
    build: Build, tmp_path: Path, chat_tokenizer: Any, logged: list[str]
) -> None:
    records = [
        {"instruction": "What is a ship?", "output": "It slides."},
        {
            "messages": [
                {"role": "user", "content": "x " * 50},
                {"role": "assistant", "content": "y"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    ]
    for number, record in enumerate(records):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record) + "\n")
    dataset = build(
        type="InstructionDataLoader",
        dataset_files=[str(tmp_path / "*.jsonl")],
        tokenizer=chat_tokenizer,
        seq_length=64,
    )
    assert len(dataset) == 1
    labels = [label for label in dataset.row(0).labels.tolist() if label != -100]
    assert chat_tokenizer.decode(labels) == "It slides.<|im_end|>So.<|im_end|>"
    assert logged[0].startswith("data: 3 conversations of 3 file(s), ")
    assert logged[1:] == [
        "warning: 1 sample(s) with no answer within seq_length 64 were left out; "
        f"the first is {tmp_path}/1.jsonl:1"
    ]


def test_the_cache_is_reused_until_a_file_changes(
    build: Build, corpus: Path, logged: list[str]
) -> None:
    first = build(dataset_dir=str(corpus))
    again = build(dataset_dir=str(corpus))
    assert "(from the cache " in logged[1]
    assert again.fingerprint == first.fingerprint

    path = corpus / "1.txt"
    os.utime(path, ns=(1, 1))  # the same content at another time
    assert build(dataset_dir=str(corpus)).fingerprint == first.fingerprint
    assert "(from the cache " in logged[2]

    path.write_text(path.read_text() + "!")
    changed = build(dataset_dir=str(corpus))
    assert "(from the cache " not in logged[3]
    assert changed.fingerprint != first.fingerprint
    assert first.row(0).input_ids.tolist() == again.row(0).input_ids.tolist()


def test_a_stream_serves_every_length_from_one_folder(
    build: Build, corpus: Path, logged: list[str]
) -> None:
    short = build(dataset_dir=str(corpus), seq_length=8)
    long = build(dataset_dir=str(corpus), seq_length=32)
    assert "(from the cache " in logged[1]
    assert short.total_targets() == long.total_targets()
    # The last EOS token is not a target: it does not get a row of its own.
    assert all_inputs(short) == all_inputs(long)[: 8 * len(short)]
    assert len(all_inputs(long)) - len(all_inputs(short)) <= 1
    assert short.fingerprint != long.fingerprint


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (None, {}),
        ("concatenate", {}),
        ("first_fit", {"packing_strategy": "first_fit"}),
    ],
)
def test_a_resume_can_tell_how_the_same_tokens_were_packed(
    build: Build, corpus: Path, strategy: str | None, settings: dict[str, str]
) -> None:
    usual, built = (build(dataset_dir=str(corpus), packing_strategy=s) for s in (None, strategy))
    assert built.content == usual.content
    assert built.settings == settings


@pytest.mark.parametrize(
    "change",
    [
        {"packing": False},
        {"num_samples": 3},
        {"tokenizer": train_tokenizer(eos_token="<|im_end|>")},
    ],
    ids=["packing", "num_samples", "tokenizer"],
)
def test_every_setting_has_its_own_folder(
    build: Build, corpus: Path, logged: list[str], change: dict[str, Any]
) -> None:
    build(dataset_dir=str(corpus))
    build(dataset_dir=str(corpus), **change)
    assert "(from the cache " not in logged[1]


def test_warnings_are_said_again_with_the_cache(
    build: Build, corpus: Path, logged: list[str]
) -> None:
    (corpus / "bad.txt").write_bytes(b"caf\xe9 au lait")
    build(dataset_dir=str(corpus))
    build(dataset_dir=str(corpus))
    assert len(logged) == 4
    assert logged[1] == logged[3]
    assert "1 file(s) are not valid UTF-8" in logged[1]


@pytest.mark.parametrize("damage", ["cut", "absent", "facts"])
def test_a_damaged_folder_is_made_again(
    build: Build, corpus: Path, tmp_path: Path, logged: list[str], damage: str
) -> None:
    first = build(dataset_dir=str(corpus))
    (tokens,) = (tmp_path / "cache").glob("*/tokens.bin")
    if damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif damage == "absent":
        tokens.unlink()
    else:
        (tokens.parent / "facts.json").write_text("{")
    assert build(dataset_dir=str(corpus)).fingerprint == first.fingerprint
    assert "are damaged and are made again" in logged[1]


def test_nothing_is_left_behind(build: Build, corpus: Path, tmp_path: Path) -> None:
    old = tmp_path / "cache" / ".old.tmp"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    build(dataset_dir=str(corpus))
    (corpus / "zz.txt").symlink_to("nowhere")
    with pytest.raises(UserError):
        build(dataset_dir=str(corpus))
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == []


@pytest.mark.parametrize(
    ("content", "packing", "expected"),
    [
        (
            "",
            True,
            "has nothing to train on (1 file(s), 0 document(s), 0 token(s)): a dataset needs",
        ),
        (" \n", False, "note: 1 empty document(s) were left out."),
    ],
)
def test_an_empty_corpus(
    build: Build, tmp_path: Path, content: str, packing: bool, expected: str
) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError) as caught:
        build(dataset_dir=str(tmp_path), packing=packing, cache_dir=tmp_path / "c")
    assert str(caught.value).startswith(f"data_loader: '{tmp_path}' has nothing to train on")
    assert expected in str(caught.value)


def test_a_cache_that_cannot_be_written(build: Build, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        build(dataset_dir=str(corpus), cache_dir=tmp_path / "file" / "cache")
    assert "the data cache cannot be written (Not a directory)" in str(caught.value)
    assert "set data_cache.dir or another output_dir." in str(caught.value)
