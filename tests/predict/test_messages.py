"""Conversations as prompts: where they may be, and mistakes with file, line and the nearest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import rules
from launcher.config.command_line import parse
from launcher.config.resolve import resolve_command_line
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import UserError
from launcher.predict.prompts import read_prompts

HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "clock"}}


def read(given: Any) -> list[Any]:
    """Each prompt: its text, or its turns as (role, content)."""
    return [
        prompt.text if prompt.conversation is None
        else [(turn["role"], turn["content"]) for turn in prompt.conversation.messages]
        for prompt in read_prompts(given)
    ]  # fmt: skip


RECORDS: list[tuple[Any, Any]] = [
    ({"messages": [HI]}, [("user", "Hi")]),
    ([HI], [("user", "Hi")]),
    ([{"role": "system", "content": "S"}, HI], [("system", "S"), ("user", "Hi")]),
    ({"messages": [HI], "system": "S"}, [("system", "S"), ("user", "Hi")]),
    ({"prompt": "plain"}, "plain"),
    ("plain", "plain"),
    ({"prompt": [HI]}, [("user", "Hi")]),
    ({"prompt": "Hi", "system": "S"}, [("system", "S"), ("user", "Hi")]),
    ({"prompt": "Hi", "tools": [TOOL]}, [("user", "Hi")]),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, [("user", "Hi")]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a\nb"}]}]},
     [("user", "a\nb")]),
]  # fmt: skip


def test_records_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    expected = [turns for _, turns in RECORDS]
    values = [value for value, _ in RECORDS]
    texts = [json.dumps(value) for value in values]
    assert read([text for text in texts if text[0] != '"']) == [
        found for value, found in RECORDS if not isinstance(value, str)
    ]
    assert read(texts[0]) == expected[:1]
    lines = tmp_path / "chats.jsonl"
    lines.write_text("\n\n".join(texts) + "\n")
    assert read(str(lines)) == expected
    (tmp_path / "chats.json").write_text(json.dumps(values))
    assert read(str(tmp_path / "chats.json")) == expected
    (tmp_path / "one.json").write_text(json.dumps([HI], indent=1))
    assert read(str(tmp_path / "one.json")) == [[("user", "Hi")]]
    (tmp_path / "lines.json").write_text("\n".join(texts))
    assert read(str(tmp_path / "lines.json")) == expected
    (tmp_path / "prompts.txt").write_text('{"prompt": 1}\n[{"x')
    assert read(str(tmp_path / "prompts.txt")) == ['{"prompt": 1}', '[{"x']  # text, whatever it is


def test_tools_arguments_and_unused_fields() -> None:
    strictness = Strictness(strict=True, tally=Tally())
    record = {"messages": [HI], "tools": [TOOL], "mesages": 1, "id": 3}
    (prompt,) = read_prompts(json.dumps(record), strictness)
    assert prompt.conversation is not None
    assert prompt.conversation.tools == [TOOL]
    assert "`mesages` (1, first in --predict_data" in "".join(strictness.tally.warnings())


WRONG: dict[str, tuple[str, list[str]]] = {
    "bracket": ('{"messages": [{"role": "user"}', ["chats.jsonl:2", "not valid JSON", "Column 31"]),
    "key twice": ('{"prompt": "a", "prompt": "b"}', ["chats.jsonl:2", "duplicate key 'prompt'"]),
    "misspelt": ('{"promt": "a"}', ["chats.jsonl:2", "promt", "did you mean `prompt`?"]),
    "other name": ('{"question": "a"}', ["chats.jsonl:2", "did you mean `prompt`?"]),
    "other list": ('{"dialogue": []}', ["chats.jsonl:2", "did you mean `messages`?"]),
    "role": ('[{"role": "usr", "content": "a"}]', ["chats.jsonl:2", "did you mean `user`?"]),
    "no content": ('[{"role": "user"}]', ["chats.jsonl:2", "messages[0].content"]),
    "number": ("12", ["chats.jsonl:2", "is a number"]),
    "number as prompt": ('{"prompt": 3}', ["chats.jsonl:2", "`prompt` is a number"]),
    "prompt of turns": ('{"prompt": [{"role": "usr"}]}', ["chats.jsonl:2", "'prompt[0].role'"]),
    "empty": ('{"messages": []}', ["chats.jsonl:2", "'messages' = []"]),
    "image": ('[{"role": "user", "content": [{"type": "image_url"}]}]', ["only text"]),
    "surrogate": ('"\\ud83d"', ["chats.jsonl:2", "UTF-8"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_in_a_file_have_its_line(tmp_path: Path, name: str) -> None:
    line, parts = WRONG[name]
    file = tmp_path / "chats.jsonl"
    file.write_text(f'{json.dumps([HI])}\n{line}\n{{"promt": 1}}\n')
    with pytest.raises(UserError) as caught:
        read_prompts(str(file))
    first, second = map(str, caught.value.problems)  # wrong lines are reported together
    assert all(part in first for part in parts), first
    assert "data_loader" not in first
    assert "chats.jsonl:3" in second


def test_mistakes_in_one_json_value_have_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "chats.json"
    file.write_text('[\n  {"role": "user",\n   "content": }\n]')
    with pytest.raises(UserError) as caught:
        read_prompts(str(file))
    assert f"{file}:3:" in str(caught.value)
    assert "Column 15" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--predict_data", '[{"role": "user", "content": "a"'], ["--predict_data", "Column 33"]),
        (["--predict_data", "[{'role': 'user'}]"], ["--predict_data", "double quotes"]),
        (["--interactive", "--run_mode", "eval"], ["--interactive", "Nearest: run_mode predict"]),
        (["--system", "S", "--chat_template", "none", "--predict_data", "a"],
         ["--system", "chat_template is none"]),
        (["--interactive", "maybe"], ["unexpected argument `maybe`"]),
        (["--interactve"], ["did you mean `--interactive`?"]),
        (["--predict_data", "a", "generation_config.topk=3"],
         ["did you mean `generation_config.top_k`?"]),
        ([], ["input_data is missing", "--interactive"]),
    ],
)  # fmt: skip
def test_the_configuration_is_checked_before_anything_heavy(
    tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_mode: predict\n")
    line = parse(["--config", str(path), *words])
    resolved = resolve_command_line(line)
    found = [*line.problems, *resolved.problems,
             *rules.check(resolved.config, resolved.provenance, world=1)]  # fmt: skip
    texts = [str(problem) for problem in found]
    assert any(all(part in text for part in parts) for text in texts), texts


@pytest.mark.parametrize(
    ("words", "interactive", "given"),
    [
        (["--interactive", "seed=3"], True, None),
        (["--interactive", "--seed", "3"], True, None),
        (["--interactive", "False"], False, None),
        (["--interactive=true"], True, None),
        (["--predict_data", '[{"role":"user","content":"a\\nb"}]'], False,
         '[{"role":"user","content":"a\\nb"}]'),
        (["--predict_data", '["a", "b"]'], False, ["a", "b"]),
        (["--predict_data", "a\\nb"], False, "a\nb"),
    ],
)  # fmt: skip
def test_words_of_the_command_line(
    tmp_path: Path, words: list[str], interactive: bool, given: Any
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_mode: predict\n")
    resolved = resolve_command_line(parse(["--config", str(path), *words]))
    assert not resolved.problems
    assert resolved.config.interactive is interactive
    assert resolved.config.input_data == given
