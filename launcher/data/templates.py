"""The chat template of a tokenizer: which one is used, and rendering with it.

Owns the choice among named templates (as in `transformers`: `tool_use` for a conversation with
tools, else `default`), and whether a template marks its answers with `{% generation %}` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

from launcher.data.conversations import Conversation, Turn
from launcher.data.records import kind_of
from launcher.errors import UserError
from launcher.json_text import lone_surrogate

DEFAULT_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}"
    "{{- (eos_token if eos_token else '<|im_end|>') + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""For a tokenizer without a template: ChatML, with the tokenizer's EOS token after each turn, so
that generation stops there."""

Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """One template of a tokenizer."""

    tokenizer: Any
    text: str
    shown: set[tuple[str, str]] = field(default_factory=set)
    """(role, field) pairs that are known to change the rendered text."""

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template has a `{% generation %}` block outside of comments."""
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            tokens = [
                (kind, word)
                for _, kind, word in environment.lex(self.text)
                if kind in ("block_begin", "name")
            ]
        except TemplateSyntaxError:
            return False  # the first rendering reports it
        return any(
            before[0] == "block_begin" and token == ("name", "generation")
            for before, token in pairwise(tokens)
        )

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens of the tokenizer, which include its end-of-turn marks."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special}
        return frozenset(special | set(self.tokenizer.all_special_tokens))

    def render(
        self,
        conversation: Conversation,
        messages: list[Turn],
        *,
        prompt: bool = False,
        with_tools: bool = True,
    ) -> str:
        """Render messages of a conversation; `prompt` adds the generation prompt.

        Raises UserError when the template raises.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools if with_tools else None,
                chat_template=self.text,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except Exception as error:
            raise _rejected(conversation, error) from error
        return text

    def render_marked(
        self, conversation: Conversation, messages: list[Turn]
    ) -> tuple[str, list[Span]]:
        """Render messages, with the character spans of the generation blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _rejected(conversation, error) from error
        return texts[0], [(begin, end) for begin, end in spans[0]]


class ChatTemplates:
    """The templates of a tokenizer, one for each kind of conversation."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.is_default = not getattr(tokenizer, "chat_template", None)
        self._known: dict[bool, ChatTemplate] = {}

    def of(self, conversation: Conversation) -> ChatTemplate:
        """The template for a conversation. Raises UserError when there is no `default`."""
        has_tools = conversation.tools is not None
        if has_tools not in self._known:
            self._known[has_tools] = ChatTemplate(self.tokenizer, self._text(has_tools))
        return self._known[has_tools]

    def _text(self, has_tools: bool) -> str:
        found = self.tokenizer.chat_template if not self.is_default else DEFAULT_CHAT_TEMPLATE
        if isinstance(found, dict):
            names = ("tool_use", "default") if has_tools else ("default",)
            text = next((found[name] for name in names if name in found), None)
            if text is None:
                raise _no_default(found)
            found = text
        if not isinstance(found, str):
            raise UserError(
                f"the chat template of the tokenizer is {kind_of(found)}",
                rule="a chat template is a Jinja template, or several by name",
                advice="Fix tokenizer_config.json",
            )
        if wrong := lone_surrogate(found):
            raise UserError(
                f"the chat template of the tokenizer has {wrong}, half of a surrogate pair",
                rule="a string must be Unicode that UTF-8 can encode",
                advice="Fix tokenizer_config.json or chat_template.jinja",
            )
        return found


def _no_default(found: dict[str, str]) -> UserError:
    return UserError(
        "the tokenizer has several chat templates and none is named `default`",
        rule="conversations are rendered with the template `default`, or `tool_use` if they have "
        "tools",
        nearest=f"Templates found: {', '.join(sorted(found))}",
        advice="Name one of them `default` in tokenizer_config.json (or chat_template.jinja)",
    )


def _rejected(conversation: Conversation, error: Exception) -> UserError:
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return UserError(
            f"the chat template of the tokenizer is not a Jinja template: line {error.lineno}: "
            f"{error.message}",
            rule="conversations are rendered with it",
            advice="Fix chat_template.jinja, or chat_template in tokenizer_config.json",
        )
    roles = ", ".join(str(message.get("role")) for message in conversation.messages)
    return UserError(
        f"the chat template rejects the conversation ({error})",
        where=conversation.where,
        rule="a conversation must have turns that the tokenizer's chat template supports",
        nearest=f"Its turns: {roles}",
        advice="Fix the record, or use a tokenizer whose template supports it",
    )
