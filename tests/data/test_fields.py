"""Fields of records: known ones work, unknown ones are counted by name, wrong ones are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataLoaderSection
from launcher.data.conversations import Conversation
from launcher.data.loaders import read_samples, source_files
from launcher.data.tally import Tally
from launcher.errors import UserError

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
ALPACA = {"instruction": "Why?", "output": "Because."}
HUMAN = {"from": "human", "value": "Why?"}
GPT = {"from": "gpt", "value": "Because."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def read(
    tmp_path: Path, *records: dict[str, Any], suffix: str = "jsonl", **settings: Any
) -> tuple[list[Conversation], list[str]]:
    """The conversations of a file of these records, and the warnings."""
    path = tmp_path / f"d.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    loader = DataLoaderSection(type="InstructionDataLoader", dataset_files=[str(path)], **settings)
    tally = Tally()
    found = list(read_samples(loader, source_files(loader), tmp_path / "cache", tally))
    assert tally.documents == len(found)
    return found, [line.replace(str(tmp_path) + "/", "") for line in tally.warnings()]


def messages(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [USER, *turns], **fields}


def sharegpt(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"conversations": [HUMAN, *turns], **fields}


WORKS: list[tuple[str, dict[str, Any], list[dict[str, Any]], set[int]]] = [
    # name, record, messages, answers that are context
    (
        "history comes first and is a target",
        {**ALPACA, "history": [["One?", "1"], ["Two?", "2"]], "system": "Be brief."},
        [
            SYSTEM,
            *({"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}),
            *({"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}),
            *(USER, ANSWER),
        ],
        set(),
    ),
    ("history of nothing", {**ALPACA, "history": [], "input": None}, [USER, ANSWER], set()),
    ("input alone", {**ALPACA, "instruction": "", "input": "Why?"}, [USER, ANSWER], set()),
    ("alpaca weight", {**ALPACA, "weight": 0}, [USER, ANSWER], {1}),
    ("weight 0", messages({**ANSWER, "weight": 0}, USER, ANSWER), [USER, ANSWER] * 2, {1}),
    ("weight 1", messages({**ANSWER, "weight": 1}), [USER, ANSWER], set()),
    ("weight 0.0", messages({**ANSWER, "weight": 0.0}), [USER, ANSWER], {1}),
    ("train false", messages({**ANSWER, "train": False}), [USER, ANSWER], {1}),
    ("training false", messages({**ANSWER, "training": False}), [USER, ANSWER], {1}),
    ("loss false", messages({**ANSWER, "loss": False}), [USER, ANSWER], {1}),
    ("loss_weight 0", messages({**ANSWER, "loss_weight": 0}), [USER, ANSWER], {1}),
    ("loss_mask 0", messages({**ANSWER, "loss_mask": 0}), [USER, ANSWER], {1}),
    ("two that agree", messages({**ANSWER, "weight": 0, "train": False}), [USER, ANSWER], {1}),
    ("null weight", messages({**ANSWER, "weight": None}), [USER, ANSWER], set()),
    ("question of weight 0", {"messages": [{**USER, "weight": 0}, ANSWER]}, [USER, ANSWER], set()),
    (
        "a turn outweighs its record",
        messages(ANSWER, USER, {**ANSWER, "weight": 1}, weight=0),
        [USER, ANSWER] * 2,
        {1},
    ),
    ("sharegpt weight", sharegpt({**GPT, "weight": 0}), [USER, ANSWER], {1}),
    (
        "the system field moves the turns",
        sharegpt({**GPT, "weight": 0}, system="Be brief."),
        [SYSTEM, USER, ANSWER],
        {2},
    ),
    ("system of messages", messages(ANSWER, system="Be brief."), [SYSTEM, USER, ANSWER], set()),
    (
        "the same system text twice",
        {"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."},
        [SYSTEM, USER, ANSWER],
        set(),
    ),
    (
        "parts of a content",
        messages({**ANSWER, "content": [{"type": "text", "text": "Be"}, "cause."]}),
        [USER, ANSWER],
        set(),
    ),
    (
        "arguments as JSON in a string",
        messages(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
            }
        ),
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
            },
        ],
        set(),
    ),
    (
        "metadata",
        messages(ANSWER, id=1, source="x", category="y", tags=["z"], metadata={"a": 1}),
        [USER, ANSWER],
        set(),
    ),
    ("finished prompt", {**ALPACA, "text": "### Instruction: Why?"}, [USER, ANSWER], set()),
    ("no images", sharegpt(GPT, images=[], audios=None), [USER, ANSWER], set()),
]


@pytest.mark.parametrize(("record", "turns", "context"), [case[1:] for case in WORKS],
                         ids=[case[0] for case in WORKS])  # fmt: skip
def test_known_fields_work(
    tmp_path: Path, record: dict[str, Any], turns: list[dict[str, Any]], context: set[int]
) -> None:
    (found,), warnings = read(tmp_path, record)
    assert found.messages == turns
    assert found.context_turns == context
    assert warnings == []


WRONG: list[tuple[str, dict[str, Any], str, bool]] = [
    # name, record, error, whether strict_fields: False waves it through
    ("half weight", messages({**ANSWER, "weight": 0.5}), "'turn 2: weight' = 0.5: it must", True),
    ("weight as text", messages({**ANSWER, "train": "false"}), "'turn 2: train' = 'false'", True),
    ("record weight 2", {**ALPACA, "weight": 2}, "'weight' = 2: it must be 0 or 1", True),
    (
        "two that disagree",
        messages({**ANSWER, "weight": 1, "train": False}),
        "turn 2: weight = 1, turn 2: train = 0: the weights of an answer must agree",
        False,
    ),
    (
        "a question with a weight",
        {"messages": [{**USER, "train": True}, ANSWER]},
        "turn 1: a turn with the role 'user' has a weight of 1",
        True,
    ),
    ("flat history", {**ALPACA, "history": ["q", "a"]}, "'history' = ['q', 'a']: in the", True),
    ("history of three", {**ALPACA, "history": [["q", "a", "b"]]}, "[question, answer]", True),
    ("history of numbers", {**ALPACA, "history": [["q", 4]]}, "pairs of strings", True),
    ("history as objects", {**ALPACA, "history": [{"q": "a"}]}, "'history' = ", True),
    ("history 0", {**ALPACA, "history": 0}, "'history' = 0", True),
    ("system of a number", messages(ANSWER, system=5), "'system' = 5: it must be a string", True),
    (
        "two system prompts",
        {"messages": [SYSTEM, USER, ANSWER], "system": "Be kind."},
        "has two system prompts: 'system' = 'Be kind.' and a turn 'Be brief.'",
        False,
    ),
    (
        "two system prompts of sharegpt",
        {"conversations": [{"from": "system", "value": "x"}, HUMAN, GPT], "system": "y"},
        "has two system prompts",
        False,
    ),
    ("preference", {**ALPACA, "rejected": "No."}, "'rejected' = 'No.': it is preference", True),
    ("chosen", messages(ANSWER, chosen=[ANSWER]), "it is preference data", True),
    ("label", messages(ANSWER, label=True), "'label' = True: it is preference data", True),
    ("images", sharegpt(GPT, images=["a.png"]), "it is data with images, video or audio", True),
    ("image of a turn", messages({**ANSWER, "image": "a.png"}), "'messages[].image' = ", True),
    (
        "functions",
        messages(ANSWER, functions=[{"name": "f"}]),
        "the older spelling of `tools`",
        True,
    ),
    ("arguments as a list", messages(ANSWER, chat_template_kwargs=["a"]), "an object", True),
    (
        "an argument of the launcher",
        {**ALPACA, "chat_template_kwargs": {"a": 1, "tokenize": False}},
        "'chat_template_kwargs.tokenize' = False",
        True,
    ),
    (
        "image in a content",
        messages({**ANSWER, "content": [{"type": "image_url", "image_url": "a"}]}),
        "'messages[1].content' has the part {'image_url': 'a', 'type': 'image_url'}",
        False,
    ),
    ("no content", messages({"role": "assistant"}), "'messages[1].content' is missing", False),
    ("question of null", {"messages": [{**USER, "content": None}, ANSWER]}, "= None", False),
    ("a role in capitals", messages({**ANSWER, "role": "ASSISTANT"}), "`assistant`?", True),
    ("a role of sharegpt", messages({**ANSWER, "role": "gpt"}), "mean `assistant`?", True),
    ("tools of another kind", messages(ANSWER, tools={"a": 1}), "'tools' = {'a': 1}", True),
    ("tools that are not JSON", messages(ANSWER, tools="[{"), "'tools' = '[{'", True),
    ("calls of another kind", messages({**ANSWER, "tool_calls": "f()"}), "list of objects", False),
    (
        "arguments that are not JSON",
        messages({**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}),
        "'messages[1].tool_calls[0].function.arguments' = '{a': it must be JSON (",
        False,
    ),
    (
        "two formats",
        {**messages(ANSWER), **sharegpt(GPT)},
        "matches the formats messages and sharegpt",
        False,
    ),
]


@pytest.mark.parametrize(("record", "message", "lenient"), [case[1:] for case in WRONG],
                         ids=[case[0] for case in WRONG])  # fmt: skip
def test_wrong_fields_are_errors_with_the_record_or_waved_through(
    tmp_path: Path, record: dict[str, Any], message: str, lenient: bool
) -> None:
    first = {key: value for key, value in record.items() if key in ("messages", "conversations")}
    good = ALPACA if not first else messages(ANSWER) if "messages" in first else sharegpt(GPT)
    with pytest.raises(UserError) as caught:
        read(tmp_path, good, record)
    assert f"{tmp_path}/d.jsonl:2: " in str(caught.value)
    assert message in str(caught.value)
    if not lenient:
        with pytest.raises(UserError):
            read(tmp_path, good, record, strict_fields=False)
        return
    found, warnings = read(tmp_path, good, record, strict_fields=False)
    assert len(found) == 2
    assert warnings[0].startswith(
        "warning: 1 record(s) have wrong fields, ignored with strict_fields: False: `"
    )
    assert "(1, first in d.jsonl:2" in warnings[0]


def test_unknown_fields_are_counted_and_named_once(tmp_path: Path) -> None:
    found, warnings = read(
        tmp_path,
        ALPACA,
        {**ALPACA, "foo": 1},
        {**ALPACA, "foo": None, "sytem": "Be brief."},
        {**ALPACA, "foo": [], "bar": {"a": 1}},
        {**ALPACA, "foo": "x", "label": "good"},
    )
    assert len(found) == 5
    assert warnings == [
        "warning: 4 record(s) have fields that are not used: `foo` (2, first in d.jsonl:2), "
        "`sytem` (1, first in d.jsonl:3; did you mean `system`?), "
        "`bar` (1, first in d.jsonl:4), `label` (1, first in d.jsonl:5)"
    ]


def test_unknown_fields_of_turns_count_a_record_once(tmp_path: Path) -> None:
    turn = {**GPT, "mood": "glad", "values": "x"}
    _, warnings = read(tmp_path, sharegpt(turn, HUMAN, turn), sharegpt(GPT))
    assert warnings == [
        "warning: 1 record(s) have fields that are not used: "
        "`conversations[].mood` (1, first in d.jsonl:1), "
        "`conversations[].values` (1, first in d.jsonl:1; did you mean `value`?)"
    ]


def test_many_names_are_cut_and_odd_ones_can_be_printed(tmp_path: Path) -> None:
    _, (line,) = read(tmp_path, {**ALPACA, **{f"n{i}": 1 for i in range(30)}}, ALPACA)
    assert line.endswith("`n19` (1, first in d.jsonl:1), and 10 other name(s)")
    _, (line,) = read(tmp_path, {**ALPACA, "\ud83d": 1, "x" * 500: 1})
    assert "`\\ud83d` (1" in line
    assert len(line) < 300


def test_wrong_records_are_reported_together(tmp_path: Path) -> None:
    wrong = {**ALPACA, "output": 5}
    with pytest.raises(UserError) as caught:
        read(tmp_path, wrong, ALPACA, {**ALPACA, "history": 5}, wrong)
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"{tmp_path}/d.jsonl:{number}" for number in (1, 3, 4)]


def test_null_of_parquet_is_no_field(tmp_path: Path) -> None:
    """Parquet gives each record, and each object inside, the keys of all others."""
    call = {"function": {"name": "g", "arguments": {"b": "x"}}}
    first = {"function": {"name": "f", "arguments": {"a": "y"}}}
    found, warnings = read(
        tmp_path,
        messages({"role": "assistant", "content": "", "tool_calls": [first]}, weight=None),
        messages({"role": "assistant", "content": "", "tool_calls": [call]}, weight=0),
        suffix="parquet",
    )
    assert [talk.messages[1]["tool_calls"] for talk in found] == [[first], [call]]
    assert [talk.context_turns for talk in found] == [set(), {1}]
    assert warnings == []


def test_a_deep_value_is_shown_short(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep, "y" * 1000]
    with pytest.raises(UserError) as caught:
        read(
            tmp_path, {**ALPACA, "output": deep}, {**ALPACA, "output": "9" * 4000, "history": deep}
        )
    assert len(str(caught.value)) < 1500
