"""How the prompts of a job become tokens: the chat template, and whether plain prompts use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.builders.job import Job
from launcher.builders.run_metadata import CHAT
from launcher.checkpoint.files import read_json
from launcher.checkpoint.names import parse_rank_file
from launcher.config.chat_template import trains_on_conversations
from launcher.config.schema import Config
from launcher.data.chat_rendering import ChatRenderer, ChatSettings, chat_settings
from launcher.data.strictness import Strictness
from launcher.errors import UserError
from launcher.generation.settings import GenerationSettings
from launcher.parallel.all_ranks import on_all_ranks
from launcher.predict.encode import (
    EncodedPrompt,
    Encoder,
    Reason,
    ending_turns,
    has_system,
    reason_to_render,
)
from launcher.predict.prompts import Prompt
from launcher.weights.ranks.manifests import STATE_FOLDER
from launcher.weights.source import Source

ANSWER_TOKENS = 2048
"""New tokens of an answer where no length is configured; fewer where the model has less room."""


@dataclass(frozen=True, kw_only=True)
class ChatSetup:
    """How a job encodes prompts, and where answers end."""

    encoder: Encoder
    settings: GenerationSettings
    """Those of answers: they also end at the end of a turn."""
    reason: Reason
    end_mark: str
    """The end of a turn in the template, where the model does not end there by itself."""

    @property
    def _has_unused_template(self) -> bool:
        """Whether the tokenizer has a template that plain prompts do not use by default."""
        is_default = self.encoder.renderer.templates.is_default
        return not is_default and self.reason in (Reason.BASE, Reason.TRAINED_ON_TEXT)

    def describe(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        """Lines for the log: how prompts are rendered, and what is new or left out by it."""
        renderer, lines = self.encoder.renderer, list[str]()
        rendered = [prompt for prompt in prompts if prompt.conversation is not None]
        own_system = sum(_had_system(prompt, self.encoder) for prompt in rendered)
        if rendered and self.encoder.renders_text:
            lines.append(
                f"prompts are rendered with {renderer.name} ({self.reason.value}); "
                "--chat_template none continues them as text"
            )
        elif rendered:
            lines.append(f"conversations are rendered with {renderer.name}")
        elif self._has_unused_template:
            lines.append(
                f"prompts are continued as text ({self.reason.value}); --chat_template default "
                "renders them with the chat template of the tokenizer"
            )
        if rendered and self.end_mark:
            lines.append(f"answers end at {self.end_mark!r} too, the end of a turn")
        if own_system:
            lines.append(f"--system: {own_system} conversation(s) have their own system prompt, "
                         "which is used instead")  # fmt: skip
        continued = sum(_continues(prompt) for prompt in rendered)
        if continued:
            lines.append(f"{continued} conversation(s) end with an answer, which is continued")
        return [*lines, *renderer.warnings()]


def chat_setup(
    job: Job, source: Source | None, settings: GenerationSettings, strictness: Strictness,
    *, ends_are_set: bool = False,
) -> ChatSetup:  # fmt: skip
    """The chat template of a job and how it is used. Called by all ranks together.

    `source`: the weights. `ends_are_set`: the user configured the end tokens, which are kept.
    Raises `UserError`.
    """
    config = job.config
    trained = job.world.from_main(saved_run(source))
    chosen = on_all_ranks(job.world, lambda: settings_with_training(config, trained))
    renderer = ChatRenderer(job.tokenizer, chosen, strictness)
    if config.system is not None and chosen.is_raw:
        raise UserError(
            "system is set and chat_template is 'none'",
            rule="a system prompt is rendered with a chat template",
            advice="Leave one of them out",
        )
    reason = reason_to_render(
        renderer,
        settings.eos_token_ids,
        is_set=job.config.chat_template is not None or config.system is not None,
        trained_on_conversations=None
        if trained is None
        else trains_on_conversations(trained["configuration"]),
    )
    ending, mark = settings, ""
    if not ends_are_set and not chosen.is_raw:
        ending, mark = ending_turns(settings, renderer)
    encoder = Encoder(
        renderer=renderer,
        renders_text=reason.renders,
        system=config.system,
        bos_token_id=settings.bos_token_id,
    )
    return ChatSetup(encoder=encoder, settings=ending, reason=reason, end_mark=mark)


def settings_with_training(config: Config, trained: Mapping[str, Any] | None) -> ChatSettings:
    """How the conversations of a job are rendered: as in the run that trained the weights, where
    the configuration has no template of its own. `trained`: see `saved_run`. Raises `UserError`."""
    own = chat_settings(config)
    saved = (trained or {}).get(CHAT)
    if config.chat_template is not None or not isinstance(saved, dict):
        return own
    return ChatSettings.from_json(saved).updated_by(own)


def encode_prompts(setup: ChatSetup, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
    """The tokens of prompts. Raises `UserError` with the first of those that are rejected."""
    return [setup.encoder.encode(prompt) for prompt in prompts]


def saved_run(source: Source | None) -> Mapping[str, Any] | None:
    """What the training run that saved rank files has recorded: its `configuration` by dotted key,
    and how it rendered conversations (`CHAT`), if that was configured. None for other weights, and
    where its state file is not there."""
    if source is None or source.kind != "distributed":
        return None
    for file in source.headers:
        parsed = parse_rank_file(file.name)
        if parsed is not None:
            state = read_json(file.parent.parent / STATE_FOLDER / parsed[0].record) or {}
            kept = {key: state[key] for key in ("configuration", CHAT) if key in state}
            return kept if isinstance(kept.get("configuration"), dict) else None
    return None


def _had_system(prompt: EncodedPrompt, encoder: Encoder) -> bool:
    """Whether a conversation had a system prompt of its own beside that of the configuration."""
    found = prompt.conversation
    if found is None or encoder.system is None or not has_system(found):
        return False
    first = found.messages[0]
    return first["role"] != "system" or first["content"] != encoder.system


def _continues(prompt: EncodedPrompt) -> bool:
    found = prompt.conversation
    return found is not None and bool(found.messages) and found.messages[-1]["role"] == "assistant"
