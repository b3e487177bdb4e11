"""Which tokens carry loss: roles, the last turn, a switch of a message, end marks, white space."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from launcher.data.rows import NO_TARGET
from launcher.errors import UserError

from .conftest import CHATML, Build, train_tokenizer

LLAMA3 = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n\\n' + (m.content | trim) "
    "+ '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n\\n' -}}{%- endif -%}"
)
BLOCK = "{% generation %}{{ m.content BLOCK_END }}{% endgeneration %}"
BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    f"{BLOCK}{{{{ REST }}}}{{% else %}}{{{{ m.content + '<|im_end|>\n' }}}}{{% endif %}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCK_WITHOUT_MARK = BLOCKS.replace("BLOCK_END", "").replace("REST", "'<|im_end|>\n'")
BLOCK_WITH_MARK = BLOCKS.replace("BLOCK_END", "+ '<|im_end|>'").replace("REST", "'\n'")
BLOCK_WITH_SPACE = BLOCKS.replace("BLOCK_END", "+ '<|im_end|>\n'").replace("REST", "''")
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "block without mark": BLOCK_WITHOUT_MARK,
    "block with mark": BLOCK_WITH_MARK,
    "block with white space": BLOCK_WITH_SPACE,
}

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    SYSTEM,
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A ship."},
    {"role": "tool", "content": "4"},
    {"role": "user", "content": "And it?"},
    {"role": "assistant", "content": "A ramp."},
]
S, U1, A1, T, U2, A2 = (f"{turn['content']}<|im_end|>" for turn in TALK)


def learnt(build: Build, tmp_path: Path, template: str, *records: Any, **settings: Any) -> Any:
    """The runs of learnt tokens of each record, decoded."""
    tokenizer = train_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = template
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = build(
        type="InstructionDataLoader", dataset_files=[str(path)], tokenizer=tokenizer,
        seq_length=128, packing=False, **settings,
    )  # fmt: skip
    found = []
    for index in range(len(rows)):
        labels = rows.row(index).labels.tolist()
        runs = groupby(labels, key=lambda label: label != NO_TARGET)
        found.append([tokenizer.decode(list(run)) for is_learnt, run in runs if is_learnt])
    return found


def marked(*switches: Any) -> dict[str, Any]:
    """The talk with `train` in some turns; None: without it."""
    turns = [
        turn if switch is None else {**turn, "train": switch}
        for turn, switch in zip(TALK, switches, strict=True)
    ]
    return {"messages": turns}


NONE = (None,) * 6
EVERY = ["system", "user", "assistant", "tool"]
CASES = [  # name, switches of turns, keys of the data loader, what is learnt
    ("answers", NONE, {}, [A1, A2]),
    ("the last answer", NONE, {"train_on_turns": "last"}, [A2]),
    ("questions", NONE, {"train_on_roles": ["user"]}, [U1, U2]),
    ("every role", NONE, {"train_on_roles": EVERY}, [S, U1, A1, T, U2, A2]),
    ("tools, last", NONE, {"train_on_roles": ["tool"], "train_on_turns": "last"}, [T]),
    (
        "the last of two roles",
        NONE,
        {"train_on_roles": ["user", "tool"], "train_on_turns": "last"},
        [U2],
    ),
    ("one switched off", (None, None, False, None, None, None), {}, [A2]),
    (
        "a question switched off",
        (None, False, None, None, None, None),
        {"train_on_roles": ["user", "assistant"]},
        [A1, U2, A2],
    ),
    (
        "one switched on beside the last",
        (None, None, True, None, None, None),
        {"train_on_turns": "last"},
        [A1, A2],
    ),
    (
        "the last one switched off",
        (None, None, True, None, None, False),
        {"train_on_turns": "last"},
        [A1],
    ),
]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize(("switches", "keys", "runs"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_what_is_learnt(
    build: Build, tmp_path: Path, template: str, switches: Any, keys: Any, runs: list[str]
) -> None:
    """The first token of a turn and its end mark are learnt; white space behind it is not."""
    assert learnt(build, tmp_path, template, marked(*switches), **keys) == [runs]


def test_other_formats_have_roles_too(build: Build, tmp_path: Path) -> None:
    alpaca = {"instruction": "What is it?", "output": "A ship.", "history": [["And?", "A ramp."]]}
    roles = {"train_on_roles": ["user", "assistant"]}
    assert learnt(build, tmp_path, CHATML, alpaca, **roles) == [["And?<|im_end|>", A2, U1, A1]]
    assert learnt(build, tmp_path, CHATML, alpaca, train_on_turns="last") == [[A1]]
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A ship."},
             {"from": "tool", "value": "4"}, {"from": "gpt", "value": "A ramp."}]  # fmt: skip
    keys = {"train_on_roles": ["tool"]}
    assert learnt(build, tmp_path, CHATML, {"conversations": turns}, **keys) == [[T]]


def test_rows_of_other_keys_are_other_rows(build: Build, tmp_path: Path, logged: list[str]) -> None:
    """The cache tells them apart."""
    for keys in ({}, {"train_on_turns": "last"}, {"train_on_roles": ["user"]}):
        learnt(build, tmp_path, CHATML, marked(*NONE), **keys)
    assert sum("from the cache" in line for line in logged) == 0
    learnt(build, tmp_path, CHATML, marked(*NONE), train_on_turns="last")
    assert sum("from the cache" in line for line in logged) == 1


def test_a_switch_of_a_role_that_is_not_learnt(build: Build, tmp_path: Path) -> None:
    record = marked(None, True, None, None, None, None)
    with pytest.raises(UserError) as caught:
        learnt(build, tmp_path, CHATML, record)
    (problem,) = caught.value.problems
    assert problem.where.endswith("talk.jsonl:1")
    assert "turn 2" in problem.what
    assert "user" in problem.nearest
    both = ["user", "assistant"]
    assert learnt(build, tmp_path, CHATML, record, train_on_roles=both) == [[U1, A1, U2, A2]]


def test_a_turn_that_the_template_moves_is_an_error(build: Build, tmp_path: Path) -> None:
    """Its text cannot be found by rendering another one in its place."""
    moves = CHATML.replace("message['content'] +", "message['content'] | reverse | join +")
    with pytest.raises(UserError) as caught:
        learnt(build, tmp_path, moves, marked(*NONE), train_on_roles=["user"], strict_fields=False)
    assert "turn 2 (user)" in caught.value.problems[0].what
