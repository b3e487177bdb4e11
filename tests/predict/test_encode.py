"""When prompts are rendered with a chat template, where answers end, and thoughts apart."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.data.chat_rendering import ChatRenderer, ChatSettings
from launcher.data.conversations import Conversation
from launcher.errors import UserError
from launcher.generation.settings import GenerationSettings
from launcher.predict.answers import answer_message, split_thoughts, with_answer
from launcher.predict.encode import (
    Encoder,
    Reason,
    end_of_turn,
    ending_turns,
    reason_to_render,
)
from launcher.predict.prompts import Prompt
from tests.predict.tiny_tokenizer import tiny_tokenizer

CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
NEXT_ROLE = (  # the end of a turn is the beginning of the next one, as GLM-4 has it
    "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
ALTERNATING = (
    "{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{ raise_exception('no system prompts') }}{%- endif -%}"
    "[{{ m.content }}]</s>{%- endfor -%}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer_with(template: str | dict[str, str] | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def id_of(token: str) -> int:
    return int(tokenizer_with(None).convert_tokens_to_ids(token))


@pytest.mark.parametrize(
    ("template", "mark"),
    [(CHATML, "<|im_end|>"), (NEXT_ROLE, "<|user|>"), (ALTERNATING, "</s>"), (None, "</s>")],
)
def test_the_end_of_a_turn_is_found(template: str | None, mark: str) -> None:
    assert end_of_turn(ChatRenderer(tokenizer_with(template))) == id_of(mark)


RULE: list[tuple[str | None, str, dict[str, Any], Reason]] = [
    (CHATML, "<|im_end|>", {}, Reason.SHIPPED),
    (CHATML, "</s>", {}, Reason.BASE),
    (NEXT_ROLE, "<|user|>", {}, Reason.SHIPPED),
    (None, "</s>", {}, Reason.NO_TEMPLATE),
    (None, "</s>", {"trained_on_conversations": True}, Reason.TRAINED),
    (CHATML, "</s>", {"trained_on_conversations": True}, Reason.TRAINED),
    (CHATML, "<|im_end|>", {"trained_on_conversations": False}, Reason.TRAINED_ON_TEXT),
    (CHATML, "</s>", {"is_set": True, "trained_on_conversations": False}, Reason.SET),
]


@pytest.mark.parametrize(("template", "end", "given", "reason"), RULE)
def test_plain_prompts_are_rendered_by_a_rule(
    template: str | None, end: str, given: dict[str, Any], reason: Reason
) -> None:
    renderer = ChatRenderer(tokenizer_with(template))
    given = {"is_set": False, "trained_on_conversations": None} | given
    assert reason_to_render(renderer, (id_of(end),), **given) is reason
    raw = ChatRenderer(tokenizer_with(template), ChatSettings(is_raw=True))
    assert not reason_to_render(raw, (id_of(end),), **given).renders


def test_answers_end_at_the_end_of_a_turn() -> None:
    renderer = ChatRenderer(tokenizer_with(CHATML))
    settings, mark = ending_turns(GenerationSettings(eos_token_ids=(2,)), renderer)
    assert settings.eos_token_ids == (2, id_of("<|im_end|>"))
    assert mark == "<|im_end|>"
    assert ending_turns(settings, renderer) == (settings, "")


def encoder(template: str | None = CHATML, **changes: Any) -> Encoder:
    renderer = ChatRenderer(tokenizer_with(template), changes.pop("settings", None))
    return Encoder(renderer=renderer, renders_text=changes.pop("renders_text", True), **changes)


def conversation(*turns: tuple[str, str]) -> Conversation:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Conversation(where="chats.jsonl:1", messages=messages)


def test_prompts_become_the_tokens_of_training() -> None:
    own = encoder(system="S")
    plain = own.encode(Prompt(text="Hi"))
    head = "<|im_start|>system\nS<|im_end|><|im_start|>user\nHi<|im_end|>"
    assert plain.text == f"{head}<|im_start|>assistant"
    assert list(plain.ids) == own.tokenizer(plain.text, add_special_tokens=False)["input_ids"]
    with_own = own.encode(Prompt(conversation=conversation(("system", "T"), ("user", "Hi"))))
    assert "S<|im_end|>" not in with_own.text
    begun = own.encode(Prompt(conversation=conversation(("user", "Hi"), ("assistant", "Well"))))
    assert begun.text == f"{head}<|im_start|>assistant\nWell"
    raw = encoder(renders_text=False).encode(Prompt(text="Hi"))
    assert (raw.text, raw.conversation) == ("Hi", None)


def test_what_a_template_cannot_render_is_an_error_with_its_place() -> None:
    asked = Prompt(conversation=conversation(("system", "S"), ("user", "Hi")))
    with pytest.raises(UserError, match=r"chats.jsonl:1.*no system prompts"):
        encoder(ALTERNATING).encode(asked)
    with pytest.raises(UserError, match=r"chats.jsonl:1: chat_template = 'none'"):
        encoder(settings=ChatSettings(is_raw=True), renders_text=False).encode(asked)


THINKS = "{{ m.reasoning_content }}</think>"
HARMONY = "<|channel|>"
SPLITS: list[tuple[str, str, str, tuple[str | None, str]]] = [
    ("plain", THINKS, "", (None, "plain")),
    ("<think>\nwhy\n</think>\n\nso", THINKS, "", ("why", "so")),
    ("<think>\n\n</think>\n\nso", THINKS, "", (None, "so")),
    ("<think>cut", THINKS, "", ("cut", "")),
    ("why</think>so", THINKS, "<|assistant|><think>\n", ("why", "so")),
    ("cut", THINKS, "<|assistant|><think>\n", ("cut", "")),
    ("say <think> and </think>", THINKS, "", (None, "say <think> and </think>")),
    ("[THINK]why[/THINK]so", "[THINK][/THINK]", "", ("why", "so")),
    ("<think>why</think>so", "no marks", "", (None, "<think>why</think>so")),
    ("<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>so",
     HARMONY, "", ("why", "so")),
    ("<|channel|>analysis<|message|>cut", HARMONY, "", ("cut", "")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "template", "prompt", "expected"), SPLITS)
def test_thoughts_are_apart(
    text: str, template: str, prompt: str, expected: tuple[str | None, str]
) -> None:
    assert split_thoughts(text, template, prompt) == expected


def test_an_answer_becomes_a_message_that_the_template_reads_back() -> None:
    tokenizer = tokenizer_with(CHATML + "{# #}{{ m.thinking if m.thinking }}{{ '</think>' }}")
    renderer = ChatRenderer(tokenizer)
    asked = conversation(("user", "Hi"))
    template = renderer.templates.of(asked)
    ids = tokenizer("<think>why</think>so<|im_end|>", add_special_tokens=False)["input_ids"]
    answer = answer_message(tokenizer, template, "", ids)
    assert answer == {"role": "assistant", "content": "so", "thinking": "why"}
    assert with_answer(asked, answer).messages[-1] == answer
    begun = conversation(("user", "Hi"), ("assistant", "A"))
    assert with_answer(begun, {"role": "assistant", "content": "B"}).messages[1:] == [
        {"role": "assistant", "content": "AB"}
    ]
