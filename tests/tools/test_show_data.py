"""--show_data: samples of every kind of data, with marks around what carries loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher import cli
from launcher.data.decoded_rows import decoded_documents
from launcher.data.rows import NO_TARGET, Row
from launcher.tools import inspect_data
from tests.data.conftest import CHATML, train_tokenizer

TALKS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"},
                  {"role": "assistant", "content": f"It is {n}.\nReally."}]}
    for n in range(4)
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"text": text}) for text in ("The ship", "Ramps \x1b[31m slide")]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    (tmp_path / "poem.txt").write_text("Ships\nslide.\n")
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.uint16))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(loader: str, more: str = "") -> None:
    Path("x.yaml").write_text(
        "output_dir: output\n"
        "model: {model_config: {type: Qwen3Config, vocab_size: 512, hidden_size: 32, num_layers: 1,"
        " num_heads: 2, n_kv_heads: 2, head_dim: 16, intermediate_size: 64,"
        " max_position_embeddings: 64}}\n"
        "processor: {tokenizer: {pretrained_model_dir: tokenizer}}\n"
        "load_checkpoint: nowhere\n"
        f"train_dataset:\n  data_loader: {loader}\n  seq_length: 64\n{more}"
    )


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["--config", "x.yaml", *words]) == 0
    return capsys.readouterr().out


CHAT = "{type: InstructionDataLoader, dataset_files: talks.jsonl, shuffle: False}"


def test_conversations(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(CHAT)
    shown = show(capsys, "--show_data", "2")
    assert shown.count("sample ") == 2
    assert "{+text+} carries loss" in shown
    expected = "  | <|im_start|>user\n  | What is 0?<|im_end|>\n  | <|im_start|>assistant\n"
    assert f"{expected}  | {{+It is 0.\n  | Really.<|im_end|>+}}\n" in shown
    tokenizer = train_tokenizer()
    ids = tokenizer("<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer("It is 0.\nReally.<|im_end|>")["input_ids"]
    count = len(ids) + len(answer)  # of the line break behind the mark nothing is an input
    assert f"(row 0): {count} tokens, {len(answer)} targets, 1 document, {64 - count} pad" in shown
    assert not (folder / "output/log").exists()
    assert inspect_data.main(["--config", "x.yaml", "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in shown.partition("sample 1")[0].splitlines()[2:])


@pytest.mark.parametrize(
    ("loader", "more", "parts"),
    [
        ("{type: TextDataLoader, dataset_dir: poem.txt}", "", ["  | Ships\n  | slide.\n"]),
        ("{type: HFDataLoader, dataset_files: texts.jsonl, shuffle: False}", "  packing: True\n",
         ["  | The ship<|endoftext|>\n  |---\n", r"Ramps \x1b[31m slide"]),
        ("{type: TokenFileDataLoader, dataset_dir: ids.npy, shuffle: False}",
         "", ["sample 0 (row 0): "]),
        ("{type: HFDataLoader, dataset_files: texts.jsonl, streaming: True, shuffle: False}",
         "runner_config: {max_steps: 2}\n", ["  | The ship<|endoftext|>\n"]),
        (f"[{CHAT[:-1]}, name: talk, weight: 2}}, "
         "{type: TextDataLoader, dataset_dir: poem.txt, name: poem, weight: 1}]", "",
         ["(row 0 of talk)", "(row 0 of poem)", "{+It is"]),
    ],
    ids=["text", "records", "tokens", "stream", "mixture"],
)  # fmt: skip
def test_every_kind_of_data(
    folder: Path, capsys: pytest.CaptureFixture[str], loader: str, more: str, parts: list[str]
) -> None:
    write(loader, more)
    shown = show(capsys, "--show_data")
    for part in parts:
        assert part in shown, shown
    assert ("carries loss" in shown) is ("{+It is" in parts)
    assert "\x1b" not in shown


PAIRS = [
    {"prompt": "What?", "chosen": "A ship.", "rejected": "No."},
    {"prompt": "Why?", "chosen": "It slides.", "rejected": "No."},
]
JUDGED = [{"prompt": "What?", "completion": "A ship.", "label": False}]


@pytest.mark.parametrize(
    ("kind", "loss", "records", "parts"),
    [
        ("PreferenceDataLoader", "dpo", PAIRS,
         ["  chosen:\n  | What?{+A ship.", "  rejected:\n  | What?{+No."]),
        ("FeedbackDataLoader", "kto", JUDGED,
         [" 1 document, ", "  undesirable:\n  | What?{+A ship."]),
    ],
)  # fmt: skip
def test_preferences(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, loss: str, records: Any,
    parts: list[str],
) -> None:  # fmt: skip
    Path("pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write(f"{{type: {kind}, dataset_files: pairs.jsonl, shuffle: False}}",
          f"trainer: {{type: {loss.upper()}Trainer}}\npreference: {{loss: {loss}}}\n")  # fmt: skip
    shown = show(capsys, "--show_data", "1")
    for part in parts:
        assert part in shown, shown
    assert "-" not in shown.partition("sample 0 (")[2].partition(" padding")[0]


def test_both_sections_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "{type: TextDataLoader, dataset_dir: poem.txt}"
    write(CHAT, f"do_eval: True\neval_dataset:\n  data_loader: {text}\n  seq_length: 64\n")
    shown = show(capsys, "--show_data=1")
    assert shown.index("train_dataset:") < shown.index("{+It is") < shown.index("eval_dataset:")


@pytest.mark.parametrize(("variable", "is_color"), [("", True), ("NO_COLOR", False)])
def test_a_terminal_has_colors(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    variable: str, is_color: bool,
) -> None:  # fmt: skip
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    write(CHAT)
    shown = show(capsys, "--show_data", "1")
    colored = "  | \033[32mIt is 0.\033[0m\n  | \033[32mReally.<|im_end|>\033[0m\n"
    assert (colored in shown) is is_color
    assert ("{+It is 0." in shown) is not is_color


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_count_that_is_none(folder: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    write(CHAT)
    assert cli.main(["--config", "x.yaml", f"--show_data={value}"]) == 2
    assert f"`--show_data` = '{value}'" in capsys.readouterr().err


def row(ids: list[int], learnt: list[bool], padding: int = 0) -> Row:
    """A row of one document, whose last token is known by its label alone."""
    labels = [new if is_learnt else NO_TARGET for new, is_learnt in zip(ids, learnt, strict=True)]
    inputs = np.array(ids[:-1] + [0] * padding, dtype=np.int64)
    return Row(inputs, np.array(labels[1:] + [NO_TARGET] * padding, dtype=np.int64), None, None)


@pytest.mark.parametrize("start", range(1, 12))
def test_pieces_are_the_text(start: int) -> None:
    """Characters of several tokens are never divided, and no space is lost."""
    tokenizer: Any = train_tokenizer()
    text = "slides. \N{SNOWMAN} It \N{SHIP}s"
    ids = tokenizer(text)["input_ids"]
    learnt = [place >= start for place in range(len(ids))]
    (document,) = decoded_documents(row(ids, learnt, padding=3), len(ids) - 1, tokenizer)
    assert "".join(piece.text for piece in document.pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in str(document.pieces)
    assert [piece.is_learnt for piece in document.pieces] == [False, True]


def test_many_pieces_are_counted() -> None:
    ids = list(range(2, 202))
    learnt = [place % 2 == 1 for place in range(200)]
    (document,) = decoded_documents(row(ids, learnt), 199, None)
    assert len(document.pieces) + document.tokens_left == 200
