"""A chat at a pseudo-terminal, with real processes and a model whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.predict.chat_model import ANSWER, POSITIONS, write_chat_model, write_long_chat
from tests.predict.terminal_job import CTRL_C, CTRL_D, TerminalJob
from tests.workshop import Workshop


@pytest.fixture(scope="module")
def folder(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_chat_model(materials, folder)
    write_long_chat(folder / "before.jsonl")
    return folder


@pytest.fixture
def jobs() -> Iterator[list[TerminalJob]]:
    """Jobs that a test starts; none outlives it."""
    started: list[TerminalJob] = []
    yield started
    for job in started:
        job.kill()


def conversations(path: Path) -> list[list[tuple[str, str]]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in rows]


def test_a_chat_loses_nothing(folder: Path, jobs: list[TerminalJob]) -> None:
    """An over-long history, a system prompt, Ctrl-C within an answer, keys typed ahead."""
    job = TerminalJob(["--config", "chat.yaml", "--interactive", "--predict_data", "before.jsonl",
                       "--output_dir", "alone"], folder)  # fmt: skip
    jobs.append(job)
    job.expect("> ")
    job.type("Ready?\r")
    job.expect("tokens with this question")
    job.expect(f"the model has {POSITIONS} positions")
    job.expect("Your question is kept")
    job.type("/drop\r")
    job.expect("the 2 oldest of 4 turns")
    job.expect(ANSWER)
    job.type("/system Be kind\r")
    job.expect("counts from the next answer on")
    job.type("go~\r")
    job.expect("abc")
    job.type("Again?")
    job.type(CTRL_C)
    job.expect("(stopped")
    job.expect("> Again?")
    job.type("\r")
    job.expect(ANSWER)
    job.expect("> ")
    job.type(CTRL_D)
    job.expect("written: alone/chat.jsonl")
    assert job.end() == [0]
    assert "\ufffd" not in job.output
    (turns,) = conversations(folder / "alone/chat.jsonl")
    stopped = turns[8][1]
    assert stopped.startswith("abcdefghijklmnopqrstuvwxyzabc"[: len(stopped)])
    assert turns[:1] + turns[2:] == [
        ("system", "Be kind"),
        ("assistant", "Yes."), ("user", "Really?"), ("assistant", "Yes."),
        ("user", "Ready?"), ("assistant", ANSWER),
        ("user", "go~"), ("assistant", stopped),
        ("user", "Again?"), ("assistant", ANSWER),
    ]  # fmt: skip
    assert len(turns[1][1]) == POSITIONS // 2 - 20  # the oldest turn is only left out of the prompt


def test_several_ranks_chat_at_the_terminal_of_one(folder: Path, jobs: list[TerminalJob]) -> None:
    job = TerminalJob(["--config", "chat.yaml", "--interactive", "--output_dir", "both",
                       "parallel_config.model_parallel=2", "--system", "Be brief"],
                      folder, world_size=2)  # fmt: skip
    jobs.append(job)
    job.expect("> ")
    job.type("go~\r")
    job.expect("abc")
    job.type(CTRL_C)
    job.expect("(stopped")
    job.type("/clear\r")
    job.expect("(a new conversation)")
    job.type("And now?\r")
    job.expect(ANSWER)
    job.type("/clera\r")
    job.expect("did you mean `/clear`?")
    job.type("/save both/kept.jsonl\r")
    job.expect("(written: both/kept.jsonl)")
    job.expect("> ")
    job.type(CTRL_C)
    assert job.end() == [130, 130], job.output
    before, last = conversations(folder / "both/chat.jsonl")
    assert [role for role, _ in before] == ["system", "user", "assistant"]
    assert last == [("system", "Be brief"), ("user", "And now?"), ("assistant", ANSWER)]
    assert conversations(folder / "both/kept.jsonl") == [last]


def test_a_conversation_that_is_too_long_from_the_start_can_be_shortened(
    folder: Path, jobs: list[TerminalJob]
) -> None:
    record = json.loads((folder / "before.jsonl").read_text())
    record["messages"].append({"role": "user", "content": "Ready?"})
    (folder / "waits.jsonl").write_text(f"{json.dumps(record)}\n")
    job = TerminalJob(["--config", "chat.yaml", "--interactive", "--predict_data", "waits.jsonl",
                       "--output_dir", "waits"], folder)  # fmt: skip
    jobs.append(job)
    job.expect("Your question is kept")
    job.expect("> ")
    job.type("/drop\r")
    job.expect(ANSWER)
    job.expect("> ")
    job.type(CTRL_D)
    job.expect("written: waits/chat.jsonl")
    assert job.end() == [0]
