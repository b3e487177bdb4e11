"""Conversations to text and tokens with the chat template of a job, for training and for predict.

Owns the one way from a conversation to what a model reads, so that both see the same tokens:

    settings = chat_settings(config)                     chat_template, chat_template_kwargs, tools
    renderer = ChatRenderer(tokenizer, settings)
    renderer.row(conversation)     -> text, answers      a row of training
    renderer.prompt(conversation)  -> text, ids          what predict feeds the model
    renderer.warnings()            -> lines              what the template left out so far

A `Conversation` is what `conversations.conversations_of` makes of records, in training and in
predict. Invariants: tools and arguments of a record win over those of the configuration; the text
is tokenized in one piece, without tokens that the tokenizer would add (the template writes them);
what the template leaves out is counted in the tally of `strictness`, or is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from launcher.config.chat_template import NO_TEMPLATE, kind_of_template
from launcher.config.schema import Config
from launcher.data.conversations import Conversation
from launcher.data.fields import TEMPLATE_KWARGS
from launcher.data.rendering_check import Rendering, check_rendering
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.data.templates import TOKENIZER_TEMPLATE, ChatTemplates
from launcher.data.tokens import backend_of
from launcher.errors import UserError, path_problem
from launcher.json_text import NotJson, parse


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How the conversations of a job are rendered."""

    text: str | None = None
    """The template, instead of those of the tokenizer."""
    name: str | None = None
    """The one of the templates of the tokenizer that is used. None: its usual one."""
    is_raw: bool = False
    """`chat_template: none`: predict feeds prompts as they are."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the template, such as `enable_thinking`."""
    tools: Sequence[Any] | None = None
    """The tools of conversations that have none of their own."""
    origin: str = TOKENIZER_TEMPLATE
    """What the template is called in messages."""

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, with the text of a template that is in a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> ChatSettings:
        """The settings that `to_json` gave; fields of another version are left out."""
        names = {own.name for own in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})

    def updated_by(self, newer: ChatSettings) -> ChatSettings:
        """These settings with the arguments and the tools of `newer`, where it has some."""
        tools = self.tools if newer.tools is None else newer.tools
        return replace(self, kwargs={**self.kwargs, **newer.kwargs}, tools=tools)


class RenderedPrompt(NamedTuple):
    """A conversation as predict feeds it."""

    text: str
    ids: list[int]


class ChatRenderer:
    """Renders the conversations of one job with one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        settings: ChatSettings | None = None,
        strictness: Strictness | None = None,
    ) -> None:
        """`strictness`: whether what a template leaves out is an error (the default), and where it
        is counted."""
        self.tokenizer = tokenizer
        self.settings = settings or ChatSettings()
        self.strictness = strictness or Strictness(strict=True, tally=Tally())
        chosen = self.settings
        self.templates = ChatTemplates(tokenizer, chosen.text, chosen.name, chosen.origin)

    @property
    def name(self) -> str:
        """The template in words, for a log line."""
        if self.templates.is_default:
            return "a ChatML-like template, since the tokenizer has none"
        return self.settings.origin

    def row(self, conversation: Conversation) -> Rendering:
        """The conversation as a row of training. Raises UserError where the template rejects it or
        leaves a turn out."""
        return self._rendered(conversation)

    def prompt(self, conversation: Conversation) -> RenderedPrompt:
        """What predict feeds for a conversation: its turns and the generation prompt; an answer at
        its end is continued instead. Raises UserError as `row` does."""
        continues = conversation.messages[-1]["role"] == "assistant"
        text = self._rendered(conversation, prompt=not continues, continues=continues).text
        return RenderedPrompt(text, rendered_ids([text], self.tokenizer)[0])

    def warnings(self) -> list[str]:
        """What templates left out of the conversations so far, one line for each kind."""
        return self.strictness.tally.warnings()

    def _rendered(
        self, conversation: Conversation, *, prompt: bool = False, continues: bool = False
    ) -> Rendering:
        prepared = self._prepared(conversation)
        template = self.templates.of(prepared)
        for name in sorted(conversation.template_kwargs.keys() - template.names):
            hidden = self.strictness.tally.hidden_fields
            hidden.add(f"{TEMPLATE_KWARGS}.{name}", conversation.where)
        rendering = Rendering(
            conversation=prepared,
            template=template,
            text=template.render(prepared, prepared.messages, prompt=prompt, continues=continues),
            prompt=prompt,
            continues=continues,
        )
        check_rendering(rendering, self.strictness)
        return rendering

    def _prepared(self, conversation: Conversation) -> Conversation:
        """The conversation with the tools and arguments of the configuration beside its own."""
        tools = conversation.tools
        if tools is None and self.settings.tools is not None:
            tools = list(self.settings.tools)
        kwargs = {**self.settings.kwargs, **conversation.template_kwargs}
        return replace(conversation, tools=tools, template_kwargs=kwargs)


def rendered_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token ids of rendered texts, each tokenized in one piece."""
    if getattr(tokenizer, "is_fast", False):
        encodings = backend_of(tokenizer).encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def chat_settings(config: Config) -> ChatSettings:
    """The settings of a configuration; files are read. Raises UserError."""
    value = config.chat_template
    tools = _tools(config.tools)
    kind = kind_of_template(value)
    common: dict[str, Any] = {"kwargs": dict(config.chat_template_kwargs), "tools": tools}
    if value is None or kind == NO_TEMPLATE:
        return ChatSettings(is_raw=kind == NO_TEMPLATE, **common)
    if kind == "file":
        origin = f"the chat template {value}"
        return ChatSettings(text=_read(value, "chat_template"), origin=origin, **common)
    if kind == "inline":
        return ChatSettings(text=value, origin="chat_template", **common)
    return ChatSettings(name=value, origin=f"the chat template `{value}`", **common)


def _read(path: str, key: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError([path_problem(error, where=f"{key} = {path!r}")]) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key} = {path!r} is not UTF-8 text", where=path, rule=str(error),
            advice="Convert the file (iconv -f LATIN1 -t UTF-8)",
        ) from None  # fmt: skip


def _tools(value: str | list[dict[str, Any]] | None) -> list[Any] | None:
    """The tools of the key `tools`: a list, or a JSON file with one."""
    if not isinstance(value, str):
        return value
    text = _read(value, "tools")
    try:
        found = parse(text)
    except NotJson as error:
        raise UserError(f"is not valid JSON: {error.reason}", where=value,
                        rule="tools is a JSON file with a list of tools") from None  # fmt: skip
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(
            "is not a list of objects", where=value,
            rule="tools is a JSON file with a list of tools",
            advice='Write [{"type": "function", "function": {"name": ...}}]',
        )  # fmt: skip
    return found
