"""Jobs of predict: conversations in, results out, and which prompts are rendered."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

from tests.predict.chat_model import ANSWER, POSITIONS, write_chat_model
from tests.predict.terminal_job import TerminalJob
from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

RENDERED = "user: Ready?"
"""The question as the template renders it: the beginning of an answer is nothing."""


@pytest.fixture(scope="module")
def folder(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = materials.copy_to(tmp_path_factory.mktemp("predict")).folder
    write_chat_model(materials, folder)
    return folder


def predict(folder: Path, output: str, *words: str, world: int = 1) -> JobResult:
    words = (
        "generation_config.max_new_tokens=99",
        f"parallel_config.data_parallel={world}",
        *words,
    )
    result = run_job(["--config", "chat.yaml", "--output_dir", output, *words], folder, world)
    assert result.code == 0, result.stderr
    return result


def rows(folder: Path, output: str) -> list[dict[str, Any]]:
    lines = (folder / output / "text_generation_result.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_plain_prompt_is_rendered_or_continued(folder: Path) -> None:
    result = predict(folder, "plain", "--predict_data", "Ready?", "--stream", "True")
    assert "prompts are rendered with the chat template of the tokenizer" in result.stdout
    assert ANSWER in result.stdout.splitlines()  # streamed: the answer alone
    (row,) = rows(folder, "plain")
    text = RENDERED + ANSWER
    assert (row["prompt"], row["text"], len(row["tokens"])) == (RENDERED, text, 15)
    assert row["messages"] == [
        {"role": "user", "content": "Ready?"}, {"role": "assistant", "content": ANSWER},
    ]  # fmt: skip
    original = (folder / "plain/text_generation_result.txt").read_text()
    assert ast.literal_eval(original) == [{"text_generation_text": [text]}]
    result = predict(folder, "raw", "--predict_data", "Ready?", "--chat_template", "none")
    assert ANSWER not in result.stdout.splitlines()  # not a terminal
    (row,) = rows(folder, "raw")
    assert row.keys() == {"prompt", "text", "tokens"}
    assert row["text"] == "Ready?" + ANSWER


def test_conversations_of_a_file_on_two_ranks(folder: Path) -> None:
    (folder / "several.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "One?"}], "tools": [{"name": "t"}], "new": 1}\n'
        '{"prompt": "Two?"}\n'
        '[{"role": "system", "content": "Own"}, {"role": "user", "content": "Three?"}]\n'
        '[{"role": "user", "content": "Four"}, {"role": "assistant", "content": "Really?"}]\n'
    )
    result = predict(folder, "several", "--predict_data", "several.jsonl", "--system", "S",
                     "--stream", "True", world=2)  # fmt: skip
    for text in ("have fields that are not used: `new`", "does not show: `tools`", "stream: True",
                 "1 conversation(s) have their own system prompt",
                 "1 conversation(s) end with an answer, which is continued"):  # fmt: skip
        assert text in result.stdout, text
    found = rows(folder, "several")
    contents = [[turn["content"] for turn in row["messages"]] for row in found]
    assert contents == [
        ["S", "One?", ANSWER], ["S", "Two?", ANSWER], ["Own", "Three?", ANSWER],
        ["S", "Four", f"Really?{ANSWER}"],
    ]  # fmt: skip
    assert found[0]["tools"] == [{"name": "t"}]
    assert [row["text"] for row in found] == [row["prompt"] + ANSWER for row in found]


def test_a_text_beside_a_conversation_is_continued_as_it_is_alone(folder: Path) -> None:
    (folder / "mixed.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "One?"}]}\n{"prompt": "go~"}\n'
    )
    predict(folder, "mixed", "--predict_data", "mixed.jsonl", "generation_config.eos_token_id=1",
            "generation_config.max_new_tokens=null", world=2)  # fmt: skip
    answer, text = rows(folder, "mixed")
    assert ANSWER in answer["text"]
    assert "messages" not in text
    assert text["text"] == "go~" + (ascii_lowercase * 2)[: len(text["tokens"])]
    assert len(text["tokens"]) < 20  # the default of max_length; answers are longer


def test_prompts_without_room_are_found_before_weights_are_read(folder: Path) -> None:
    (folder / "long.txt").write_text(f"short\n\n{'é' * POSITIONS}\n")
    arguments = ["--config", "chat.yaml", "--output_dir", "long", "--predict_data", "long.txt",
                 "generation_config.max_new_tokens=9"]  # fmt: skip
    result = run_job(arguments, folder)
    assert result.code == 2
    assert "long.txt:3: has " in result.stderr
    assert "loaded: " not in result.stdout


def test_a_terminal_shows_the_text_while_it_is_generated(folder: Path) -> None:
    job = TerminalJob(["--config", "chat.yaml", "--output_dir", "terminal", "--predict_data",
                       "go~", "generation_config.max_new_tokens=4"], folder)  # fmt: skip
    try:
        job.expect("\nabcd\r\n")
        job.expect("text_generation_text")
        assert job.end() == [0]
    finally:
        job.kill()


def test_a_checkpoint_is_asked_as_it_was_trained(folder: Path) -> None:
    workshop = Workshop(folder)
    turns = [{"role": "user", "content": "Is 3 a number?"}, {"role": "assistant", "content": "Yes"}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 16)
    common: dict[str, Any] = {
        "processor": {"tokenizer": {"pretrained_model_dir": "model"}},
        "runner_config": {"max_steps": 1}, "generation_config": {"max_new_tokens": 4},
    }  # fmt: skip
    loader = {"type": "InstructionDataLoader", "dataset_dir": None, "dataset_files": "chats.jsonl"}
    configs = {
        "text": workshop.yaml("text.yaml", output_dir="text", **common),
        "talk": workshop.yaml(
            "talk.yaml", output_dir="talk", train_dataset={"data_loader": loader}, **common
        ),
    }
    for name, config in configs.items():
        trained = run_job(["--config", config, "--run_mode", "train"], folder)
        assert trained.code == 0, trained.stderr
        words = ["--load_checkpoint", f"{name}/checkpoint", "--predict_data", "Is 3 a number?"]
        found = run_job(["--config", config, "--run_mode", "predict", *words], folder)
        assert found.code == 0, found.stderr
        reason = "as in training" if name == "talk" else "the model was trained on text"
        assert reason in found.stdout
        (row,) = rows(folder, name)
        assert ("messages" in row) is (name == "talk")
        found = run_job(["--config", config, "--run_mode", "predict", *words,
                         "--chat_template", "default", "--output_dir", "set"], folder)  # fmt: skip
        assert "(as configured)" in found.stdout
