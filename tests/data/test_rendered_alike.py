"""Training and predict feed the same tokens, over templates of different shapes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import Config
from launcher.data.chat import Sample, tokenize_conversations
from launcher.data.chat_rendering import ChatRenderer, ChatSettings, chat_settings
from launcher.data.conversations import Conversation
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import UserError

from .conftest import CHATML, train_tokenizer

THINKING = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- m.content -}}
{%- for call in m.tool_calls or [] -%}{{- '<call>' + (call.function | tojson) + '</call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}
"""
"""Like Qwen3: thoughts after the last question only, an empty one where thinking is off."""
FORGETS = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""Thoughts are dropped from every answer."""
OPENS = FORGETS.replace("assistant\\n' -}}{%- endif -%}\n", "assistant\\n<think>' -}}{%- endif -%}")
"""Like DeepSeek-R1: as before, and the prompt begins a thought, which a row has not."""
WITH_TOOLS = "{%- if tools -%}{{- tools | tojson -}}{%- endif -%}" + CHATML
BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role']=='assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = {"default": CHATML, "tool_use": WITH_TOOLS, "brief": FORGETS}

TOOL = {"type": "function", "function": {"name": "depth", "parameters": {}}}
QUESTION = {"role": "user", "content": "What is a ship?"}
ANSWER = {"role": "assistant", "content": "It slides."}
AGAIN = {"role": "user", "content": "What is a slipway?"}
THOUGHT = {"role": "assistant", "content": "A ramp.", "reasoning_content": "Ships need ramps."}
INLINE = {"role": "assistant", "content": "<think>Ramps.</think>A ramp."}
TALK = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, AGAIN, THOUGHT]
CALLS = [
    QUESTION,
    {**ANSWER, "tool_calls": [{"function": {"name": "depth", "arguments": {}}}]},
    {"role": "tool", "content": "4"},
    THOUGHT,
]


def row_of(
    tokenizer: Any, conversation: Conversation, settings: ChatSettings
) -> tuple[Sample, list[str]]:
    strictness = Strictness(strict=True, tally=Tally())
    batches = tokenize_conversations(
        [conversation], tokenizer, lambda _: None, strictness, settings=settings
    )
    ((sample,),) = batches
    return sample, strictness.tally.warnings()


def starts_of(sample: Sample) -> list[int]:
    """Where learnt tokens begin."""
    pairs = zip([False, *sample.is_target], sample.is_target, strict=False)
    return [place for place, (before, learnt) in enumerate(pairs) if learnt and not before]


SHAPES = {  # template, configuration, turns, tools, whether all answers have the context of predict
    "thinking": (THINKING, {}, TALK, None, True),
    "thinking off": (THINKING, {"enable_thinking": False}, [QUESTION, ANSWER], None, True),
    "thinking with calls": (THINKING, {}, CALLS, [TOOL], True),
    "tools": (NAMED, {}, TALK, [TOOL], True),
    "several named": (NAMED, {}, TALK, None, True),
    "none": (None, {}, TALK, None, True),
    "drops thoughts": (FORGETS, {}, [QUESTION, INLINE, AGAIN, INLINE], None, True),
    "blocks": (BLOCKS, {}, TALK, None, True),
    "opens a thought": (OPENS, {}, [QUESTION, ANSWER, AGAIN, INLINE], None, False),
    "thinking off, two turns": (THINKING, {"enable_thinking": False}, TALK, None, False),
}


@pytest.mark.parametrize(
    ("template", "kwargs", "turns", "tools", "alike"), SHAPES.values(), ids=SHAPES.keys()
)
def test_a_row_up_to_an_answer_is_what_predict_feeds(
    template: Any, kwargs: dict[str, Any], turns: list[dict[str, Any]], tools: Any, alike: bool
) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    settings = ChatSettings(kwargs=kwargs, tools=tools)
    sample, warnings = row_of(tokenizer, Conversation(where="d:1", messages=turns), settings)
    starts = starts_of(sample)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert len(starts) == len(answers)
    renderer = ChatRenderer(tokenizer, settings)
    prompts = [
        renderer.prompt(Conversation(where="d:1", messages=turns[:index])) for index in answers
    ]
    same = [
        sample.tokens[:start] == prompt.ids for start, prompt in zip(starts, prompts, strict=True)
    ]
    assert all(same) is alike
    assert any("other tokens than in predict" in line for line in warnings) is not alike
    own = tokenizer.apply_chat_template(
        turns[: answers[-1]], tools=tools, add_generation_prompt=True, return_dict=False, **kwargs
    ) if template else prompts[-1].ids  # fmt: skip
    assert prompts[-1].ids == own


def test_an_answer_at_the_end_is_continued() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML
    prompt = ChatRenderer(tokenizer).prompt(
        Conversation(where="p", messages=[QUESTION, {"role": "assistant", "content": "It sl"}])
    )
    assert prompt.text.endswith("<|im_start|>assistant\nIt sl")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_reach_a_template_under_any_name(name: str, read: str) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "message['content'] +", f"(message.{read} or '') + '|' + message['content'] +"
    )
    turns = [QUESTION, {"role": "assistant", "content": "A ramp.", name: "Ships."}]
    renderer = ChatRenderer(tokenizer)
    assert "Ships.|A ramp." in renderer.row(Conversation(where="d:1", messages=turns)).text
    assert renderer.warnings() == []


@pytest.mark.parametrize(
    ("template", "turns", "count"),
    [
        (THINKING, [QUESTION, THOUGHT], 0),
        (THINKING, [QUESTION, THOUGHT, AGAIN, THOUGHT], 1),  # equal texts
        (THINKING, [QUESTION, {**THOUGHT, "reasoning_content": "Hm."}, AGAIN, THOUGHT], 1),
        (FORGETS, [QUESTION, INLINE, AGAIN, INLINE], 2),
    ],
)
def test_dropped_thoughts_are_counted(template: str, turns: Any, count: int) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    _, warnings = row_of(tokenizer, Conversation(where="d:1", messages=turns), ChatSettings())
    found = [line for line in warnings if "thoughts" in line]
    assert len(found) == (count > 0)
    assert not count or f"{count} answer(s) in 1 record(s); the first is d:1" in found[0]


def test_a_template_without_thoughts_or_tools_names_what_it_leaves_out() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML
    renderer = ChatRenderer(tokenizer, ChatSettings(tools=[TOOL]))
    talk = Conversation(
        where="d:1", messages=[QUESTION, THOUGHT], template_kwargs={"enable_thinking": True}
    )
    renderer.row(talk)
    (line,) = renderer.warnings()
    for name in ("tools", "messages[].reasoning_content", "chat_template_kwargs.enable_thinking"):
        assert f"`{name}` (1, first in d:1" in line


def test_what_a_record_has_wins_over_the_configuration() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = WITH_TOOLS.replace("{%- if tools", "{{- mood -}}{%- if tools")
    settings = ChatSettings(kwargs={"mood": "calm"}, tools=[TOOL])
    renderer = ChatRenderer(tokenizer, settings)

    def text(**fields: Any) -> str:
        return renderer.row(Conversation(where="d", messages=[QUESTION, ANSWER], **fields)).text

    assert text().startswith('calm[{"type": "function"')
    own = [{"name": "own"}]
    assert text(tools=own).startswith('calm[{"name": "own"}]')
    assert text(tools=[]).startswith("calm<|im_start|>")
    assert text(template_kwargs={"mood": "glad"}).startswith("glad[")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "<|im_start|>user"),
        ("brief", "brief <|im_start|>user"),
        ("{{ 'inline ' }}" + CHATML, "inline <|im_start|>user"),
        ("file.jinja", "file <|im_start|>user"),
    ],
)
def test_the_configuration_chooses_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.jinja").write_text("{{ 'file ' }}" + CHATML)
    Path("tools.json").write_text(json.dumps([TOOL]))
    tokenizer = train_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "brief": "{{ 'brief ' }}" + CHATML}
    settings = chat_settings(Config(chat_template=value, tools="tools.json"))
    assert settings.tools == [TOOL]
    assert not settings.is_raw
    row = ChatRenderer(tokenizer, settings).row(
        Conversation(where="d", messages=[QUESTION, ANSWER])
    )
    assert row.text.startswith(expected)
    assert chat_settings(Config(chat_template="none")).is_raw


def templates_of_trl() -> list[Path]:
    """The chat templates that trl ships, those of many models; none where it is not installed."""
    spec = importlib.util.find_spec("trl")
    folders = (spec.submodule_search_locations or []) if spec else []
    return sorted(
        path for folder in folders for path in Path(folder).glob("chat_templates/*.jinja")
    )


SPECIAL = re.compile(
    r"<[|｜][^|｜<>' ]+[|｜]>|<[|]?(?:start_of_|end_of_)?turn[|]?>|</?s>|\[/?INST\]"
)


@pytest.mark.long
def test_templates_of_many_models() -> None:
    """Wherever a row differs from what predict feeds it is counted; ends are learnt, once."""
    checked = 0
    for path in templates_of_trl():
        text = path.read_text()
        tokenizer = train_tokenizer(bos_token="<|endoftext|>")
        tokenizer.add_special_tokens(
            {"additional_special_tokens": sorted({*SPECIAL.findall(text)})}
        )
        settings = ChatSettings(text=text)
        for turns in ([QUESTION, ANSWER], [QUESTION, ANSWER, AGAIN, THOUGHT]):
            talk = Conversation(where="d:1", messages=turns)
            try:
                sample, warnings = row_of(tokenizer, talk, settings)
            except UserError:
                continue  # a template for pictures, or with other rules about turns
            starts = starts_of(sample)
            renderer = ChatRenderer(tokenizer, settings)
            prompts = [
                renderer.prompt(Conversation(where="d:1", messages=turns[:index])).ids
                for index in range(1, len(turns), 2)
            ]
            same = len(starts) == len(prompts) and all(
                sample.tokens[:start] == ids for start, ids in zip(starts, prompts, strict=True)
            )
            has_marks = "phi3" in path.name and "training" in path.name  # two blocks an answer
            assert same or has_marks or any("than in predict" in line for line in warnings), path
            answer = tokenizer.decode(
                [new for new, learnt in zip(sample.tokens, sample.is_target, strict=True) if learnt]
            )
            assert ANSWER["content"] in answer, path
            assert answer == answer.rstrip() or "end token" in str(warnings), path
            checked += 1
    assert checked > 50
