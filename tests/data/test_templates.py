"""Which chat template is used, what it leaves out, and samples without targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.data.chat import tokenize_conversations
from launcher.data.conversations import Conversation
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.data.templates import ChatTemplate
from launcher.errors import UserError

from .conftest import CHATML, Build, train_tokenizer

BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role']=='assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
SHOUTS = CHATML.replace("message['content'] +", "message['content'] | upper +")
TOOLS = "{%- if tools -%}{{- tools | tojson -}}{%- endif -%}" + CHATML.replace(
    "message['content'] + ",
    "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') + ",
)
ONE_SYSTEM = (  # only the first turn may be a system text, others vanish (as in older templates)
    "{%- for message in messages -%}{%- if message['role'] != 'system' or loop.first -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
QUESTION = {"role": "user", "content": "What is a ship?"}
ANSWER = {"role": "assistant", "content": "It slides."}
TALK = [QUESTION, ANSWER]
TARGETS = "It slides.<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One whose template the tests may change."""
    return train_tokenizer()


def targets_of(
    tokenizer: Any,
    template: Any,
    *talks: list[dict[str, Any]],
    strict: bool = True,
    **fields: Any,
) -> tuple[list[str], list[str]]:
    """The targets of each conversation, and the warnings."""
    tokenizer.chat_template = template
    tally = Tally()
    strictness = Strictness(strict=strict, tally=tally)
    found = [
        Conversation(where=f"d.jsonl:{number}", messages=turns, **fields)
        for number, turns in enumerate(talks, 1)
    ]
    batches = tokenize_conversations(found, tokenizer, lambda _: None, strictness, 100)
    texts = []
    for sample in (sample for batch in batches for sample in batch):
        pairs = zip(sample.tokens, sample.is_target, strict=True)
        texts.append(tokenizer.decode([token for token, target in pairs if target]))
    return texts, tally.warnings(100)


@pytest.mark.parametrize(
    ("template", "tools", "expected"),
    [
        ({"default": CHATML, "rag": BLOCKS}, None, TARGETS),
        ({"default": BLOCKS, "rag": CHATML}, None, TARGETS),
        ({"default": SHOUTS, "tool_use": CHATML}, [{"name": "f"}], TARGETS),
        ({"default": SHOUTS, "tool_use": BLOCKS}, [{"name": "f"}], TARGETS),
        ({"default": BLOCKS, "tool_use": SHOUTS}, None, TARGETS),
        ({"default": BLOCKS, "tool_use": SHOUTS}, [{"name": "f"}], "IT SLIDES.<|im_end|>"),
        ({"default": BLOCKS, "rag": SHOUTS}, [{"name": "f"}], TARGETS),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_the_template_that_transformers_takes_is_the_one_looked_at(
    tokenizer: Any, tmp_path: Path, template: Any, tools: Any, expected: str, saved: bool
) -> None:
    used = tokenizer
    if saved:  # as chat_template.jinja with additional_chat_templates/
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        assert (tmp_path / "additional_chat_templates").is_dir()
        used = AutoTokenizer.from_pretrained(tmp_path)
        template = used.chat_template
    assert targets_of(used, template, TALK, tools=tools)[0] == [expected]


def test_a_list_of_named_templates_is_read(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "rag", "template": SHOUTS}, {"name": "default", "template": BLOCKS}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    used = AutoTokenizer.from_pretrained(tmp_path)
    assert targets_of(used, used.chat_template, TALK)[0] == [TARGETS]


def test_templates_without_a_default_are_named(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="Templates found: rag, tool_use") as caught:
        targets_of(tokenizer, {"rag": BLOCKS, "tool_use": CHATML}, TALK, TALK)
    assert len(caught.value.problems) == 1
    names = {"rag": BLOCKS, "tool_use": CHATML}
    assert targets_of(tokenizer, names, TALK, tools=[{"name": "f"}])[0] == [TARGETS]


@pytest.mark.parametrize("template", [{"default": 5}, {"default": ["x"]}, {"default": "\ud83d"}])
def test_a_template_that_is_no_text_is_an_error(tokenizer: Any, template: Any) -> None:
    with pytest.raises(UserError, match="the chat template of the tokenizer "):
        targets_of(tokenizer, template, TALK)


def test_a_template_that_is_no_jinja_is_said_once_and_not_of_the_records(tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        targets_of(tokenizer, CHATML + "\n{{ m.content }", TALK, TALK)
    (problem,) = caught.value.problems
    assert problem.what.startswith("the chat template of the tokenizer is not a Jinja template: ")
    assert "line 2: unexpected '}'" in problem.what


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("{% generation %}x{% endgeneration %}", True),
        ("{%- generation -%}x{%- endgeneration -%}", True),
        ("{%+ generation +%}x{% endgeneration %}", True),
        ("{%generation%}x{%endgeneration%}", True),
        ("{# {% generation %} #}x", False),
        ("{% raw %}{% generation %}{% endraw %}", False),
        ("{{ '{% generation %}' }}", False),
        ("{% if generation %}x{% endif %}", False),
        ("{% for broken", False),
    ],
)
def test_marks_are_blocks_of_the_template(text: str, marks: bool) -> None:
    assert ChatTemplate(None, text).marks_answers is marks


def test_a_mark_in_a_comment_does_not_count(tokenizer: Any) -> None:
    assert targets_of(tokenizer, "{# {% generation %} #}" + CHATML, TALK)[0] == [TARGETS]


@pytest.mark.parametrize("template", [CHATML, BLOCKS], ids=["found", "blocks"])
@pytest.mark.parametrize("context", [{1}, {3}, {1, 3}])
def test_answers_that_are_context_are_no_targets(
    tokenizer: Any, template: str, context: set[int]
) -> None:
    other = {"role": "assistant", "content": "Yes."}
    turns = [QUESTION, ANSWER, QUESTION, other]
    (target,), warnings = targets_of(tokenizer, template, turns, context_turns=frozenset(context))
    parts = {1: TARGETS, 3: "Yes.<|im_end|>"}
    assert target == "".join(text for turn, text in parts.items() if turn not in context)
    logged = (
        "warning: 1 sample(s) without an answer to train on were left out; the first is d.jsonl:1"
    )
    assert warnings == ([logged] if len(context) == 2 else [])


# What a template leaves out


@pytest.mark.parametrize(
    ("turns", "logged"),
    [
        (
            [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, *TALK],
            "d.jsonl:1: the chat template leaves out turn 2 (system): 'B': every turn",
        ),
        (
            # The text of the turn occurs elsewhere, and the turn is left out all the same.
            [{"role": "system", "content": "A"}, {"role": "system", "content": "ship"}, *TALK],
            "leaves out turn 2 (system): 'ship'",
        ),
        ([QUESTION, {"role": "system", "content": "Be brief."}, ANSWER], "turn 2 (system)"),
    ],
)
def test_a_turn_that_the_template_leaves_out_is_an_error(
    tokenizer: Any, turns: list[dict[str, Any]], logged: str
) -> None:
    with pytest.raises(UserError) as caught:
        targets_of(tokenizer, ONE_SYSTEM, turns)
    assert logged in str(caught.value)
    texts, warnings = targets_of(tokenizer, ONE_SYSTEM, turns, strict=False)
    assert texts == [TARGETS]
    assert "`content of system turns` (1, first in d.jsonl:1)" in warnings[0]
    assert targets_of(tokenizer, CHATML, turns) == ([TARGETS], [])


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message['content'] +", "message['content'] | trim +"),
        CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +"),
        # The system text is put before the last question (as in Mistral).
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '[INST]' + "
        "(messages[0].content if messages[0].role == 'system' and loop.index0 > 0 else '') "
        "+ m.content + '[/INST]' -}}{%- elif m.role == 'assistant' -%}"
        "{{- m.content + eos_token -}}{%- endif -%}{%- endfor -%}",
    ],
    ids=["trimmed", "without thoughts", "moved"],
)
def test_a_turn_that_the_template_changes_is_not_left_out(tokenizer: Any, template: str) -> None:
    turns = [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": " What is a ship?  "},
        {"role": "assistant", "content": "It slides."},
    ]
    texts, warnings = targets_of(tokenizer, template, turns)
    assert texts[0].startswith("It slides.")
    assert warnings == []


def test_answers_in_capitals_are_not_left_out(tokenizer: Any) -> None:
    texts, warnings = targets_of(tokenizer, SHOUTS, TALK)
    assert texts == ["IT SLIDES.<|im_end|>"]
    assert warnings == []


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_fields_that_the_template_does_not_show_are_counted(tokenizer: Any) -> None:
    called = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    named = [{**QUESTION, "name": "Ann", "id": 3}, {**ANSWER, "reasoning_content": "Hm."}]
    texts, warnings = targets_of(tokenizer, CHATML, called, TALK, named, called)
    assert texts == ["<|im_end|>", TARGETS, TARGETS, "<|im_end|>"]
    assert warnings == [
        "warning: 3 record(s) have fields that the chat template does not show: "
        "`messages[].tool_calls` (2, first in d.jsonl:1), "
        "`messages[].reasoning_content` (1, first in d.jsonl:3), "
        "`messages[].name` (1, first in d.jsonl:3)"
    ]
    texts, warnings = targets_of(tokenizer, TOOLS, called, called)
    assert warnings == []
    assert texts[0].startswith('[{"type": "function"')


def test_fields_of_false_and_zero_are_counted_too(tokenizer: Any) -> None:
    flagged = [QUESTION, {**ANSWER, "mask": 0, "prefix": False, "refusal": None, "audio": []}]
    (line,) = targets_of(tokenizer, CHATML, flagged)[1]
    assert line.count("messages[].") == 2
    assert "`messages[].mask`" in line
    assert "`messages[].prefix`" in line


def test_tools_that_the_template_does_not_show_are_counted(tokenizer: Any) -> None:
    tools = [{"name": "f"}]
    assert targets_of(tokenizer, TOOLS, TALK, tools=tools)[1] == []
    (line,) = targets_of(tokenizer, CHATML, TALK, TALK, tools=tools)[1]
    assert line.endswith("does not show: `tools` (2, first in d.jsonl:1)")


# Samples without targets


def test_samples_without_a_lesson_are_counted_with_the_first(
    build: Build, tmp_path: Path, tokenizer: Any, logged: list[str]
) -> None:
    tokenizer.chat_template = CHATML
    long = {"messages": [{**QUESTION, "content": "x " * 50}, ANSWER]}
    records = [
        {"messages": TALK},
        {"messages": [QUESTION]},
        long,
        {"messages": [ANSWER]},
        {"messages": [QUESTION, {**ANSWER, "weight": 0}]},
        long,
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for packing in (True, False):
        logged.clear()
        dataset = build(
            type="InstructionDataLoader", dataset_files=[str(path)], tokenizer=tokenizer,
            seq_length=48, packing=packing,
        )  # fmt: skip
        assert len(dataset) == 1
        assert logged[1:] == [
            "warning: 3 sample(s) without an answer to train on were left out; "
            f"the first is {path}:2",
            "warning: 2 sample(s) with no answer within seq_length 48 were left out; "
            f"the first is {path}:3",
        ]


@pytest.mark.parametrize("packing", [True, False])
def test_documents_of_one_token_are_counted(
    build: Build, tmp_path: Path, logged: list[str], packing: bool
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "the ship"}\n{"text": "x"}\n{"text": "y"}\n')
    build(
        type="HFDataLoader", dataset_files=[str(path)], packing=packing,
        tokenizer=train_tokenizer(eos_token=None),
    )  # fmt: skip
    assert logged[1:] == [
        f"warning: 2 sample(s) with fewer than two tokens have no target; the first is {path}:2"
    ]


def test_a_file_without_targets_is_explained(build: Build, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION]}) + "\n")
    with pytest.raises(UserError) as caught:
        build(type="InstructionDataLoader", dataset_files=[str(path)], tokenizer=tokenizer)
    assert "1 sample(s) without an answer to train on were left out" in str(caught.value)
    assert "seq_length" not in str(caught.value)
