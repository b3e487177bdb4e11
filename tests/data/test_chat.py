"""Only answers are targets, with templates of every common kind."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from launcher.data.chat import tokenize_conversations
from launcher.data.conversations import Conversation
from launcher.data.templates import DEFAULT_CHAT_TEMPLATE
from launcher.errors import UserError

from .conftest import CHATML, train_tokenizer
from .tokenizers_of_kinds import WithoutOffsets

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a slipway?"},
    {"role": "assistant", "content": "A ramp for ships."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "By the sea."},
]
WITH_GENERATION = CHATML.replace(
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}",
    "{%- if message['role'] == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' -}}{%- endif -%}",
)
# The last answer has an empty thought, answers of the past have none (as in Qwen3).
THOUGHT_IN_LAST = CHATML.replace(
    "message['content'] + ",
    "('<think>\\n\\n</think>\\n\\n' if loop.last and message['role'] == 'assistant' else '') "
    "+ message['content'] + ",
)
# The prompt opens a thought that the past does not keep (as in DeepSeek-R1).
THOUGHT_IN_PROMPT = CHATML.replace(
    "assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif"
)
# No marks at all, upper-case speakers and a new line (as in Vicuna's first versions).
PLAIN = (
    "{%- for message in messages -%}{{- message['role'].upper() + ': ' + message['content'] + "
    "'\\n' "
    "-}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"
)
LLAMA2 = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] + ' ' + eos_token -}}{%- else -%}"
    "{{- '[INST] ' + message['content'] + ' [/INST]' -}}{%- endif -%}{%- endfor -%}"
)
FIRST_ONLY_SHOUTS = (  # changes earlier turns when more follow: the answer cannot be found
    "{%- for message in messages -%}{{- message['role'] + (messages | length | string) + "
    "message['content'] -}}{%- endfor -%}"
)


def samples_of(
    tokenizer: Any, template: str | None, *conversations: list[dict[str, Any]]
) -> tuple[list[Any], list[str]]:
    tokenizer.chat_template = template
    logged: list[str] = []
    talks = [
        Conversation(where=f"data.jsonl:{number}", messages=turns)
        for number, turns in enumerate(conversations, 1)
    ]
    batches = list(tokenize_conversations(talks, tokenizer, logged.append))
    return [sample for batch in batches for sample in batch], logged


def target(tokenizer: Any, sample: Any) -> list[str]:
    """The runs of targets, decoded."""
    runs: list[list[int]] = []
    previous = False
    for token, is_target in zip(sample.tokens, sample.is_target, strict=True):
        if is_target:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = bool(is_target)
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(scope="module")
def own_tokenizer() -> PreTrainedTokenizerFast:
    """One whose template the tests may change."""
    return train_tokenizer()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["A ramp for ships.<|im_end|>", "By the sea.<|im_end|>"]),
        (WITH_GENERATION, ["A ramp for ships.<|im_end|>", "By the sea.<|im_end|>"]),
        (
            THOUGHT_IN_LAST,
            ["A ramp for ships.<|im_end|>", "<think>\n\n</think>\n\nBy the sea.<|im_end|>"],
        ),
        (THOUGHT_IN_PROMPT, ["A ramp for ships.<|im_end|>", "By the sea.<|im_end|>"]),
        (PLAIN, ["A ramp for ships.\n", "By the sea.\n"]),
        (LLAMA2, [" A ramp for ships. <|endoftext|>", " By the sea. <|endoftext|>"]),
        (None, ["A ramp for ships.<|endoftext|>", "By the sea.<|endoftext|>"]),
    ],
    ids=["chatml", "generation", "thought-last", "thought-prompt", "plain", "llama2", "default"],
)
@pytest.mark.parametrize("offsets", [True, False])
def test_only_answers_and_their_end_are_targets(
    own_tokenizer: Any, template: str | None, expected: list[str], offsets: bool
) -> None:
    used = own_tokenizer if offsets else WithoutOffsets(own_tokenizer)
    own_tokenizer.chat_template = template
    (sample,), _ = samples_of(own_tokenizer, template, TURNS)
    if not offsets and template is not WITH_GENERATION:
        talk = Conversation(where="x", messages=TURNS)
        ((sample,),) = list(tokenize_conversations([talk], used, lambda _: None))
    assert target(own_tokenizer, sample) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA2, PLAIN, None])
def test_the_tokens_are_those_of_the_full_conversation(own_tokenizer: Any, template: Any) -> None:
    (sample,), _ = samples_of(own_tokenizer, template, TURNS)
    whole = own_tokenizer.apply_chat_template(
        TURNS, chat_template=template or DEFAULT_CHAT_TEMPLATE, tokenize=True, return_dict=True
    )
    assert sample.tokens == whole["input_ids"]


def test_the_default_template_is_said_once(own_tokenizer: Any) -> None:
    samples, logged = samples_of(own_tokenizer, None, *[TURNS] * 600)
    assert len(samples) == 600
    assert logged == ["the tokenizer has no chat template: using a ChatML-like one"]
    assert samples_of(own_tokenizer, CHATML, TURNS)[1] == []


def test_an_answer_before_any_question_is_context(own_tokenizer: Any) -> None:
    (sample,), _ = samples_of(own_tokenizer, CHATML, [TURNS[2], *TURNS[3:]])
    assert target(own_tokenizer, sample) == ["By the sea.<|im_end|>"]


def test_an_answer_that_repeats_the_question_is_found(own_tokenizer: Any) -> None:
    turns = [{"role": role, "content": "ship"} for role in ("user", "assistant") * 2]
    for template in (CHATML, THOUGHT_IN_LAST):
        (sample,), _ = samples_of(own_tokenizer, template, turns)
        runs = target(own_tokenizer, sample)
        assert [run.rpartition("\n")[2] for run in runs] == ["ship<|im_end|>"] * 2


def test_truncation_settings_of_the_tokenizer_are_ignored(own_tokenizer: Any) -> None:
    own_tokenizer.backend_tokenizer.enable_truncation(4)
    own_tokenizer.backend_tokenizer.enable_padding(length=500)
    (sample,), _ = samples_of(own_tokenizer, CHATML, TURNS)
    assert 4 < len(sample.tokens) < 500


def test_a_template_that_hides_answers_is_an_error(own_tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        samples_of(own_tokenizer, FIRST_ONLY_SHOUTS, TURNS)
    assert str(caught.value) == (
        "data.jsonl:1: the answer in turn 3 cannot be found in the rendered conversation: "
        "loss is computed on answers, so each must be a part of the rendered conversation. "
        "{% generation %} blocks in a chat template mark answers. "
        "Use a tokenizer with such a template."
    )


@pytest.mark.parametrize("generation", [False, True])
def test_a_conversation_the_template_refuses_is_named(own_tokenizer: Any, generation: bool) -> None:
    template = WITH_GENERATION if generation else CHATML
    strict = (
        "{%- if messages[0]['role'] == 'tool' -%}{{ raise_exception('No tools') }}{%- endif -%}"
    )
    with pytest.raises(UserError) as caught:
        samples_of(own_tokenizer, strict + template, TURNS, [{"role": "tool", "content": "x"}])
    (problem,) = caught.value.problems
    assert (problem.where, problem.nearest) == ("data.jsonl:2", "Its turns: tool")
    assert "No tools" in problem.what
