"""The chat template of a tokenizer or of the configuration: which one is used, and rendering.

Owns the choice among named templates (as in `transformers`: `tool_use` for a conversation with
tools, else `default`; the configuration may name another one or bring its own), whether a template
marks its answers with `{% generation %}` blocks, and under which name it reads thoughts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

from launcher.data.conversations import Conversation, Turn
from launcher.data.records import kind_of
from launcher.errors import UserError, did_you_mean
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
Token = tuple[str, str]
"""Kind and text of a token of Jinja."""

TOKENIZER_TEMPLATE = "the chat template of the tokenizer"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names of the field with the thoughts before an answer; each template reads one of them, usually
the first."""
LEFT_TO_TEMPLATES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of every template."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template."""

    tokenizer: Any
    text: str
    origin: str = TOKENIZER_TEMPLATE
    """What it is called in messages."""
    shown: set[tuple[str, str]] = field(default_factory=set)
    """(role, field) pairs that are known to change the rendered text."""

    @cached_property
    def _tokens(self) -> list[Token]:
        """The tokens of the template outside of comments, without white space; empty where it is
        not Jinja, which the first rendering reports."""
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            found = [(kind, word) for _, kind, word in environment.lex(self.text)]
        except TemplateSyntaxError:
            return []
        return [token for token in found if token[0] != "whitespace"]

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template has a `{% generation %}` block outside of comments."""
        return any(
            before[0] == "block_begin" and token == ("name", "generation")
            for before, token in pairwise(self._tokens)
        )

    @cached_property
    def names(self) -> frozenset[str]:
        """The variables, fields and functions that the template mentions, also as strings."""
        return frozenset(
            word.strip("'\"") for kind, word in self._tokens if kind in ("name", "string")
        )

    @cached_property
    def thoughts_name(self) -> str:
        """The field in which the template reads thoughts; empty where it reads none."""
        read = {
            token[1].strip("'\"")
            for before, token in pairwise(self._tokens)
            if before in (("operator", "."), ("operator", "["), ("operator", "("))
            and token[0] in ("name", "string")
        }
        return next((name for name in THOUGHTS if name in read), "")

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens of the tokenizer, which include its end-of-turn marks."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special}
        return frozenset(special | set(self.tokenizer.all_special_tokens))

    @cached_property
    def mark_before_space(self) -> re.Pattern[str]:
        """Matches a special token (group 1) that white space and other text follow."""
        tokens = sorted(filter(None, self.special_tokens), key=len, reverse=True)
        return re.compile(rf"({'|'.join(map(re.escape, tokens)) or '(?!)'})\s+\S")

    def render(
        self,
        conversation: Conversation,
        messages: list[Turn],
        *,
        prompt: bool = False,
        continues: bool = False,
        with_tools: bool = True,
    ) -> str:
        """Render messages of a conversation; `prompt` adds the generation prompt, `continues` ends
        within the last message instead.

        Raises UserError when the template raises.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                self._renamed(messages),
                tools=(conversation.tools or None) if with_tools else None,
                chat_template=self.text,
                add_generation_prompt=prompt,
                continue_final_message=continues,
                tokenize=False,
                **conversation.template_kwargs,
            )
        except Exception as error:
            raise self._rejected(conversation, error) from error
        return text

    def render_marked(
        self, conversation: Conversation, messages: list[Turn]
    ) -> tuple[str, list[Span]]:
        """Render messages, with the character spans of the generation blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[self._renamed(messages)],
                tools=conversation.tools or None,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **conversation.template_kwargs},
            )
        except Exception as error:
            raise self._rejected(conversation, error) from error
        return texts[0], [(begin, end) for begin, end in spans[0]]

    def _renamed(self, messages: list[Turn]) -> list[Turn]:
        """The messages with thoughts under the name that the template reads."""
        name = self.thoughts_name
        if not name or all(len(message) == 2 for message in messages):
            return messages
        return [_with_thoughts(message, name) for message in messages]

    def _rejected(self, conversation: Conversation, error: Exception) -> UserError:
        from jinja2 import TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            is_own = self.origin == TOKENIZER_TEMPLATE
            return UserError(
                f"{self.origin} is not a Jinja template: line {error.lineno}: {error.message}",
                rule="conversations are rendered with it",
                advice="Fix chat_template.jinja, or chat_template in tokenizer_config.json"
                if is_own
                else "Fix it, or leave chat_template out to use that of the tokenizer",
            )
        roles = ", ".join(str(message.get("role")) for message in conversation.messages)
        return UserError(
            f"the chat template rejects the conversation ({error})",
            where=conversation.where,
            rule="a conversation must have turns that the chat template supports",
            nearest=f"Its turns: {roles}",
            advice="Fix the record, or use a template that supports it (chat_template)",
        )


def _with_thoughts(message: Turn, name: str) -> Turn:
    """A message with its thoughts under `name` too, the name that a template reads."""
    if message.get(name) is not None:
        return message
    given = next((other for other in THOUGHTS if message.get(other) is not None), None)
    return message if given is None else {**message, name: message[given]}


class ChatTemplates:
    """The templates of a job, one for each kind of conversation.

    `text`: the Jinja text that is used instead of the templates of the tokenizer; `name`: the one
    of these that is used, whether a conversation has tools or not; `origin`: what the template is
    called in messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | None = None,
        name: str | None = None,
        origin: str = TOKENIZER_TEMPLATE,
    ) -> None:
        self.tokenizer, self.text, self.name, self.origin = tokenizer, text, name, origin
        own = getattr(tokenizer, "chat_template", None)
        self.is_default = text is None and name is None and not own
        self._known: dict[bool, ChatTemplate] = {}

    def of(self, conversation: Conversation) -> ChatTemplate:
        """The template for a conversation. Raises UserError when there is no `default`."""
        has_tools = bool(conversation.tools)
        if has_tools not in self._known:
            text = self._chosen(has_tools)
            self._known[has_tools] = ChatTemplate(self.tokenizer, text, self.origin)
        return self._known[has_tools]

    def _chosen(self, has_tools: bool) -> str:
        if self.text is not None:
            return self.text
        found = DEFAULT_CHAT_TEMPLATE if self.is_default else self.tokenizer.chat_template
        if self.name is not None:
            found = _named(found, self.name)
        elif isinstance(found, dict):
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
        advice="Write the name of one of them as chat_template, or name one `default` in "
        "tokenizer_config.json (or chat_template.jinja)",
    )


def _named(found: Any, name: str) -> Any:
    """The template `name` of those of a tokenizer. Raises UserError when there is none."""
    if isinstance(found, dict) and name in found:
        return found[name]
    if isinstance(found, str) and name == "default":
        return found
    names = sorted(found) if isinstance(found, dict) else []
    near = did_you_mean(name, names) or (f"Templates found: {', '.join(names)}" if names else "")
    raise UserError(
        f"chat_template = {name!r}",
        rule="it must be the name of a template of the tokenizer, a file or Jinja text",
        nearest=near or "The tokenizer has one template, without a name"
        if found
        else "The tokenizer has no chat template",
        advice="Leave it out to use the usual template of the tokenizer",
    )
