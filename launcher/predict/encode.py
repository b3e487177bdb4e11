"""Prompts to the tokens that the model reads: as text, or rendered with the chat template.

Owns when a prompt is rendered, and where its answer ends. Conversations are always rendered. A
plain prompt is rendered when one of these is so, in this order:

1. `chat_template` or `system` is set (`chat_template: none`: never);
2. the weights are a checkpoint of a training run on conversations (of any other run: never);
3. the tokenizer has a chat template, and the model ends its turns: the token that the template
   writes behind an answer is an end token of the model.

By the third rule the tokenizer of a base model, which often has the template of the chat models
made from it, changes nothing: a base model ends at another token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from launcher.data.chat_rendering import ChatRenderer, rendered_ids
from launcher.data.conversations import Conversation, Turn
from launcher.errors import UserError
from launcher.generation.settings import GenerationSettings
from launcher.predict.prompts import Prompt

SYSTEM_ROLES = ("system", "developer")


class Reason(Enum):
    """Why plain prompts are rendered, or are not."""

    SET = "as configured"
    TRAINED = "as in training"
    SHIPPED = "as the model ends its answers like the template"
    RAW = "chat_template: none"
    TRAINED_ON_TEXT = "the model was trained on text"
    NO_TEMPLATE = "the tokenizer has no chat template"
    BASE = "the model does not end its answers like the template"

    @property
    def renders(self) -> bool:
        """Whether plain prompts are rendered."""
        return self in (Reason.SET, Reason.TRAINED, Reason.SHIPPED)


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    text: str
    ids: tuple[int, ...]
    conversation: Conversation | None = None
    """What was rendered; None: a text that is continued."""
    where: str = ""
    """Where it was read, for errors."""


def reason_to_render(
    renderer: ChatRenderer, end_tokens: Collection[int], *, is_set: bool,
    trained_on_conversations: bool | None,
) -> Reason:  # fmt: skip
    """Whether plain prompts are rendered, and why.

    `end_tokens`: those of the model. `is_set`: the user set a template or a system prompt.
    `trained_on_conversations`: None where the weights are no checkpoint of a training run.
    """
    if renderer.settings.is_raw:
        return Reason.RAW
    if is_set:
        return Reason.SET
    if trained_on_conversations is not None:
        return Reason.TRAINED if trained_on_conversations else Reason.TRAINED_ON_TEXT
    if renderer.templates.is_default:
        return Reason.NO_TEMPLATE
    return Reason.SHIPPED if end_of_turn(renderer) in end_tokens else Reason.BASE


def end_of_turn(renderer: ChatRenderer) -> int | None:
    """The special token that the template writes behind an answer; None where it writes none.

    Some templates write it only before the next turn, which then is looked at too.
    """
    answer = "answer-1"
    turns: list[Turn] = [
        {"role": "user", "content": "question-1"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "question-2"},
    ]
    tokenizer = renderer.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {index for index, token in added.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    for count in (2, 3):
        conversation = Conversation(where="", messages=turns[:count], tools=[])
        try:
            text = renderer.row(conversation).text
        except UserError:
            continue  # a template for other conversations
        tail = text.rpartition(answer)[2].partition("question-2")[0]
        found = [token for token in rendered_ids([tail], tokenizer)[0] if token in special]
        if found:
            return found[0]
    return None


def ending_turns(
    settings: GenerationSettings, renderer: ChatRenderer
) -> tuple[GenerationSettings, str]:
    """The settings with which an answer also ends at the end of a turn, and the token that was
    added, empty where the model ends there anyway."""
    token = end_of_turn(renderer)
    if token is None or token in settings.eos_token_ids:
        return settings, ""
    ends = (*settings.eos_token_ids, token)
    return replace(settings, eos_token_ids=ends), renderer.tokenizer.decode([token])


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes the prompts of one prediction."""

    renderer: ChatRenderer
    renders_text: bool
    """Whether plain prompts are rendered."""
    system: str | None = None
    """A system prompt for conversations without one."""
    bos_token_id: int | None = None
    """First token of an empty prompt."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self.renderer.tokenizer

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """The tokens of a prompt. Raises UserError where the template rejects it."""
        if prompt.conversation is not None:
            return self.encode_conversation(prompt.conversation)
        if self.renders_text:
            turns: list[Turn] = [{"role": "user", "content": prompt.text}]
            where = prompt.where or "a prompt"
            return self.encode_conversation(Conversation(where=where, messages=turns))
        ids = tuple(self.tokenizer(prompt.text)["input_ids"])
        if not ids and self.bos_token_id is not None:
            ids = (self.bos_token_id,)
        return EncodedPrompt(text=prompt.text, ids=ids, where=prompt.where)

    def encode_conversation(self, conversation: Conversation) -> EncodedPrompt:
        """The tokens of a conversation with the generation prompt; an answer at its end is
        continued. Raises UserError."""
        if self.renderer.settings.is_raw:
            raise UserError(
                "chat_template = 'none'",
                where=conversation.where,
                rule="messages are rendered with a chat template",
                advice="Leave chat_template out, or give the prompts as text",
            )
        if self.system is not None and not has_system(conversation):
            conversation = with_system(conversation, self.system)
        if conversation.tools is None and self.renderer.settings.tools is not None:
            conversation = replace(conversation, tools=list(self.renderer.settings.tools))
        rendered = self.renderer.prompt(conversation)
        return EncodedPrompt(
            text=rendered.text,
            ids=tuple(rendered.ids),
            conversation=conversation,
            where=conversation.where,
        )


def has_system(conversation: Conversation) -> bool:
    """Whether a conversation has a system prompt."""
    return any(message["role"] in SYSTEM_ROLES for message in conversation.messages)


def with_system(conversation: Conversation, text: str) -> Conversation:
    """The conversation with a system prompt before its turns."""
    first: Turn = {"role": "system", "content": text}
    return replace(conversation, messages=[first, *conversation.messages])
