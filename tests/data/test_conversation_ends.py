"""Where answers end in templates that render the end of a conversation in another way."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.data.chat import tokenize_conversations
from launcher.data.conversations import Conversation
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import UserError

from .target_runs import runs_of_talk, target_runs
from .tokenizers_of_kinds import byte_level

MARKS = ["<|end|>", "<|return|>", "<|user|>", "<|assistant|>", "<|message|>"]
PHI3 = (  # an end token after the conversation
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PROMPTS = (  # the first Llama 3: a generation prompt whether requested or not
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n\\n' + m.content + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>\\n\\n' }}"
)
HARMONY = (  # the last answer has a mark of its own, as in gpt-oss
    "{% for m in messages %}{{ '<|' + m.role + '|>' + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><|message|>' }}{% endif %}"
)
THOUGHT = (  # a thought is kept in the last answer alone, as in Qwen3
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
MOVED = (  # the system text is put before the last question, as in Mistral's
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' }}"
    "{{ messages[0].content + ' ' if m == asked[-1] else '' }}{{ m.content + '<|assistant|>' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_level(trim_offsets=False)
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def runs_of(tokenizer: Any, template: str, turns: list[dict[str, Any]]) -> list[str]:
    """The runs of target tokens of a conversation, as text."""
    tokenizer.chat_template = template
    return [tokenizer.decode(run) for run in target_runs(tokenizer, turns)]


def talk_of(*contents: str, system: str = "") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + turns


@pytest.mark.parametrize(
    ("template", "last"),
    [(PHI3, "<|end|>"), (PROMPTS, "<|end|>"), (HARMONY, "<|return|>")],
    ids=["end of the conversation", "always prompts", "another mark"],
)
@pytest.mark.parametrize(
    "answers",
    [["Yes"], ["Yes", "No"], ["Yes", "Yes", "Yes"], ["", ""], ["a 1000000007 b", "1000000008"]],
)
def test_each_answer_ends_at_its_own_mark(
    tokenizer: Any, template: str, last: str, answers: list[str]
) -> None:
    """Questions that repeat an answer are not targets, wherever they are."""
    contents = [text for answer in answers for text in (answer, answer)]
    expected = [answer + "<|end|>" for answer in answers[:-1]] + [answers[-1] + last]
    assert runs_of(tokenizer, template, talk_of(*contents)) == expected
    with_question = talk_of(*contents, "Yes")
    every = [answer + "<|end|>" for answer in answers]
    assert runs_of(tokenizer, template, with_question) == every


def test_thoughts_that_only_the_last_answer_keeps(tokenizer: Any) -> None:
    turns = talk_of("Why ?", "<think>x</think>Yes", "Why ?", "<think>y</think>Yes")
    expected = ["Yes<|end|>", "<think>y</think>Yes<|end|>"]
    assert runs_of(tokenizer, THOUGHT, turns) == expected


def test_a_system_text_that_moves_to_the_last_question(tokenizer: Any) -> None:
    turns = talk_of("Why ?", "Yes", "is it ?", "No", system="Be brief")
    assert runs_of(tokenizer, MOVED, turns) == ["Yes<|end|>", "No<|end|>"]


def test_an_end_that_no_special_token_marks_is_an_error(tokenizer: Any) -> None:
    template = PHI3.replace("<|end|>", "---").replace("eos_token", "'==='")
    with pytest.raises(UserError, match="the answer in turn 2 cannot be found"):
        runs_of(tokenizer, template.replace("<|", "[").replace("|>", "]"), talk_of(*"abcd"))


def test_the_same_end_in_prompts_and_marks_is_not_a_prompt(tokenizer: Any) -> None:
    """As in Command R: where a template is asked for a prompt and gives none else, the conversation
    ends with a mark, special or not."""
    template = (
        "{% for m in messages %}{{ '[' + m.role + '_TURN]' + m.content }}[END_TURN]{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant_TURN]' }}{% endif %}"
    )
    expected = ["Yes[END_TURN]", "No[END_TURN]"]
    assert runs_of(tokenizer, template, talk_of("a", "Yes", "b", "No")) == expected


GLM = (  # an answer ends with the token that begins the next turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
HEADERS = (  # a question has no mark: the token behind it begins the answer, as in DeepSeek's
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ '<|assistant|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_the_token_of_the_next_turn_ends_an_answer_without_a_mark(tokenizer: Any) -> None:
    """Behind the last answer there is none, which is counted."""
    tokenizer.chat_template = GLM
    talk = Conversation(where="d.jsonl:1", messages=talk_of("Why?", "Yes", "How?", "So"))
    assert runs_of(tokenizer, GLM, talk.messages) == ["Yes<|user|>", "So"]
    tally = Tally()
    list(tokenize_conversations([talk], tokenizer, print, Strictness(strict=True, tally=tally)))
    (line,) = tally.warnings()
    assert "end token" in line
    assert line.endswith("d.jsonl:1")


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        (HEADERS, ["Why?", "Yes<|end|>", "How?", "So<|end|>"]),
        (HARMONY, ["Why?<|end|>", "Yes<|end|>", "How?<|end|>", "So<|return|>"]),
        (PHI3, ["Why?<|end|>", "Yes<|end|>", "How?<|end|>", "So<|end|>"]),
    ],
)
def test_questions_end_at_their_own_mark(tokenizer: Any, template: str, runs: list[str]) -> None:
    tokenizer.chat_template = template
    talk = Conversation(
        where="d.jsonl:1",
        messages=talk_of("Why?", "Yes", "How?", "So"),
        learnt_roles=frozenset({"user", "assistant"}),
    )
    assert [tokenizer.decode(run) for run in runs_of_talk(tokenizer, talk)] == runs
