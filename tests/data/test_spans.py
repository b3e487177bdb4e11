"""Targets are chosen on tokens: first words, end marks and empty answers, whatever a tokenizer
joins to them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from .conftest import CHATML
from .target_runs import target_runs
from .tokenizers_of_kinds import KINDS, WithoutOffsets

SPACE = (  # the generation prompt ends in a space, and the end mark in nothing
    "{% for m in messages %}{% if m['role']=='user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
BREAKS = CHATML.replace("'\\n' + message", "'\\n\\n' + message").replace(
    "assistant\\n'", "assistant\\n\\n'"
)
PLAIN = (  # no end mark but line breaks
    "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role']=='assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role']=='user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {  # and the targets of an answer
    "chatml": (CHATML, "{}<|im_end|>"),
    "space": (SPACE, "{}<|im_end|>"),
    "breaks": (BREAKS, "{}<|im_end|>"),
    "plain": (PLAIN, "{}\n\n"),
    "blocks": (BLOCKS, "{}<|im_end|>"),
    "llama2": (LLAMA2, " {} <|im_end|>"),
}
ANSWERS = ["Yes", "", "\nA ramp .\n", ". No", "\u00e9\U0001f6a2"]

tokenizer_of = cache(lambda kind: KINDS[kind]())


def runs_of(tokenizer: Any, template: str, answer: str, *, offsets: bool) -> list[list[int]]:
    """The runs of target tokens of a conversation with the same answer twice."""
    question = {"role": "user", "content": "is it ?"}
    turns = [question, {"role": "assistant", "content": answer}] * 2
    tokenizer.chat_template = template
    return target_runs(tokenizer if offsets else WithoutOffsets(tokenizer), turns)


@pytest.mark.parametrize("offsets", [True, False], ids=["offsets", "prefixes"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_are_the_tokens_of_the_answer_and_its_mark(
    kind: str, name: str, offsets: bool
) -> None:
    """The last tokens spell answer and mark, and one token less does not: none is missing, none too
    many on either side."""
    tokenizer = tokenizer_of(kind)
    template, target = TEMPLATES[name]

    def text_of(run: list[int]) -> str:
        # Behind another token, since some decoders drop a space at the beginning.
        text = tokenizer.decode([tokenizer.eos_token_id, *run], skip_special_tokens=False)
        text = text.removeprefix("<|im_end|>")
        return "".join(text.split()) if kind == "word pieces" else text

    for answer in ANSWERS:
        expected = target.format(answer)
        if kind == "word pieces":
            expected = "".join(expected.split())
        if not expected or (not answer.isascii() and kind in ("word pieces", "metaspace")):
            continue  # these tokenizers have no token for it
        runs = runs_of(tokenizer, template, answer, offsets=offsets)
        assert len(runs) == 2, (answer, runs)
        for run in runs:
            assert text_of(run).endswith(expected), answer
            assert not text_of(run[1:]).endswith(expected), answer


@pytest.mark.parametrize(
    ("kind", "name", "answer", "expected"),
    [
        ("byte-level", "space", "Yes", ["\u0120Yes", "<|im_end|>"]),
        ("byte-level, trimmed", "space", "Yes", ["\u0120Yes", "<|im_end|>"]),
        ("metaspace", "space", "Yes", ["\u2581Yes", "<|im_end|>"]),
        ("word pieces", "space", "Yes", ["Yes", "<|im_end|>"]),
        # A space of the prompt is not part of an answer, also where offsets exclude spaces.
        ("byte-level", "space", "", ["<|im_end|>"]),
        ("byte-level, trimmed", "space", "", ["<|im_end|>"]),
        ("byte-level, trimmed", "space", "\u00e9", ["\u00c3", "\u00a9", "<|im_end|>"]),
        ("byte-level", "chatml", "", ["<|im_end|>"]),
        ("metaspace", "chatml", "", ["<|im_end|>"]),
        ("byte-level, all merges", "plain", ".", [".\u010a\u010a"]),
    ],
)
def test_targets_by_name(kind: str, name: str, answer: str, expected: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    last = runs_of(tokenizer, TEMPLATES[name][0], answer, offsets=True)[-1]
    assert tokenizer.convert_ids_to_tokens(last) == expected


def test_the_post_processor_of_the_tokenizer_stays() -> None:
    tokenizer = tokenizer_of("byte-level, trimmed")
    before = tokenizer.backend_tokenizer.to_str()
    runs_of(tokenizer, CHATML, "Yes", offsets=True)
    assert tokenizer.backend_tokenizer.to_str() == before


# The last answer has an empty thought, answers of the past have none (as in Qwen3).
THOUGHT_IN_LAST = CHATML.replace(
    "message['content'] + ",
    "('<think>\\n\\n</think>\\n\\n' if loop.last and message['role'] == 'assistant' else '') "
    "+ (message['content'].split('</think>') | last).lstrip('\\n') "
    "+ ('<call>' + message.tool_calls[0]['name'] + '</call>' if message.tool_calls else '') + ",
)


@pytest.mark.parametrize(
    ("answer", "first", "last"),
    [
        ({"content": ""}, "", ""),
        ({"content": "", "tool_calls": [{"name": "f"}]}, "<call>f</call>", "<call>f</call>"),
        ({"content": "<think>x</think>\n\nYes"}, "Yes", "Yes"),
        ({"content": "Yes", "tool_calls": [{"name": "f"}]},) + ("Yes<call>f</call>",) * 2,
    ],
    ids=["empty", "empty with calls", "thought", "calls"],
)
def test_answers_that_the_past_renders_in_another_way(
    answer: dict[str, Any], first: str, last: str
) -> None:
    tokenizer = tokenizer_of("byte-level")
    tokenizer.chat_template = THOUGHT_IN_LAST
    turns = [{"role": "user", "content": "is it ?"}, {"role": "assistant", **answer}] * 2
    tokens = [token for run in target_runs(tokenizer, turns) for token in run]
    expected = f"{first}<|im_end|><think>\n\n</think>\n\n{last}<|im_end|>"
    assert tokenizer.decode(tokens) == expected
