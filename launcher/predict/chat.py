"""A chat: reads questions and commands, prints answers as they are generated.

Owns the commands, and what happens when a conversation is too long for the model. Invariant: no
turn is lost: a stopped answer stays in the history as far as it was generated, and a question that
does not fit is kept until there is room for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from launcher.data.conversations import Turn
from launcher.errors import EXIT_OK, EXIT_SIGINT, UserError, did_you_mean
from launcher.generation.loop import Watch
from launcher.generation.settings import GenerationSettings
from launcher.json_text import lone_surrogate
from launcher.predict.answers import answer_message
from launcher.predict.encode import EncodedPrompt, Encoder
from launcher.predict.session import Session
from launcher.predict.terminal import Terminal
from launcher.predict.text_stream import TextStream, for_terminal

HELP = """\
/help          this text
/system TEXT   the system prompt from the next answer on; without TEXT: print it
/retry         answer the last question again
/clear         begin a new conversation with the same system prompt
/drop          leave the oldest turns out of what the model reads; the file keeps them
/save FILE     write this conversation to a new file of JSON lines
/exit          end (also Ctrl-D)
A line that ends in \\ is continued on the next one. Ctrl-C stops an answer, and ends the chat at
the prompt. A text that begins with such a word is sent with a space before it.
"""
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
_ANSWER_SHARE = 8
"""/drop makes room for an answer of one of this many parts of the positions."""


class Respond(Protocol):
    """Continues a prompt on all ranks: `limit` is the longest length of the text in tokens."""

    def __call__(self, prompt: EncodedPrompt, limit: int, watch: Watch) -> Sequence[int]:
        """The new tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long the text of a conversation may be."""

    settings: GenerationSettings
    positions: int | None
    """Of the model; None: no limit."""
    room: int | None
    """New tokens of an answer where `settings` has no length."""

    def of(self, length: int) -> int:
        """The longest text that begins with `length` tokens; no more than these: there is no room
        for an answer."""
        if self.room is not None:
            limit = length + self.room
        elif self.settings.max_new_tokens is not None:
            limit = length + self.settings.max_new_tokens
        else:
            limit = self.settings.max_length
        return min(limit, self.positions or limit)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text; None: no limit."""
        by_length = self.room is None and self.settings.max_new_tokens is None
        found = [self.settings.max_length] if by_length else []
        return min([*found, *([self.positions] if self.positions else [])], default=None)

    @property
    def rule(self) -> str:
        """What limits a text, in words."""
        if self.longest == self.positions:
            return f"the model has {self.positions} positions"
        return f"max_length is {self.longest} tokens, prompt included"


class Chat:
    """The chat on the rank of the terminal."""

    def __init__(
        self, session: Session, encoder: Encoder, terminal: Terminal, limits: Limits,
        respond: Respond,
    ) -> None:  # fmt: skip
        self.session, self.encoder, self.terminal = session, encoder, terminal
        self.limits, self.respond = limits, respond
        self._kept = ""
        """A question that did not fit."""
        self._warned: set[str] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._print(HELP.rstrip()), "system": self._system,
            "retry": self._retry, "clear": self._clear, "drop": self._drop, "save": self._save,
        }  # fmt: skip

    def run(self) -> int:
        """Chat until the user ends it. Returns the exit code: 130 after Ctrl-C, else 0."""
        if self.session.waits_for_answer:
            self._report_mistakes(self._answer)
        while True:
            try:
                text = self.terminal.read()
            except EOFError:
                self._print("")
                return EXIT_OK
            except KeyboardInterrupt:
                self._print("")
                return EXIT_SIGINT
            if text.strip() == "/exit":
                return EXIT_OK
            self._report_mistakes(partial(self._take, text))

    def _report_mistakes(self, action: Callable[[], None]) -> None:
        """Do something; a mistake is printed, and the chat goes on."""
        try:
            action()
        except UserError as error:
            self._print("\n".join(f"error: {problem}" for problem in error.problems))

    def _take(self, text: str) -> None:
        command = _COMMAND.fullmatch(text.rstrip())
        if command is not None:
            self._run_command(command[1], (command[2] or "").strip())
        elif text.strip():
            if wrong := lone_surrogate(text):
                raise UserError(f"the text has {wrong}", rule="a question must be valid UTF-8")
            self._ask(text.strip())

    def _run_command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            known = [f"/{command}" for command in (*self._commands, "exit")]
            raise UserError(
                f"there is no command /{name}",
                nearest=did_you_mean(f"/{name}", known),
                advice="/help lists the commands; a text is sent with a space before it",
            )
        self._commands[name](argument)

    def _ask(self, text: str) -> None:
        self._kept = ""
        self.session.ask(text)
        self._answer()

    def _answer(self) -> None:
        """Answer the last turn, or take the question back where that is not possible."""
        try:
            prompt = self.encoder.encode_conversation(self.session.prompt())
        except UserError:
            self.session.take_back_question()
            raise
        length, begun = len(prompt.ids), not self.session.waits_for_answer
        limit = self.limits.of(length)
        if limit <= length:
            if not begun:
                self._kept = self.session.take_back_question()
            self._too_long(length)
        text = TextStream(self.encoder.tokenizer, prompt.ids)

        def watch(tokens: Sequence[int | None]) -> bool:
            if tokens[0] is not None and tokens[0] not in self.limits.settings.eos_token_ids:
                new.append(tokens[0])
                self.terminal.write(for_terminal(text.push(tokens[0])))
            return self.terminal.is_stopped()

        new: list[int] = []
        try:
            with self.terminal.listening():
                tokens = self.respond(prompt, limit, watch)
                is_stopped = self.terminal.is_stopped()
        finally:  # also what there is of an answer when the job ends
            self.terminal.write(for_terminal(text.finish()))
            self._record(prompt, new)
        self._print("")
        ended = bool(tokens) and tokens[-1] in self.limits.settings.eos_token_ids
        if is_stopped and not ended:
            self._print("(stopped; what there is of the answer stays in the history)")
        elif not ended and length + len(tokens) >= limit:
            self._print(self._cut(limit))
        elif not ended and self.limits.settings.max_time is not None:
            self._print("(cut after generation_config.max_time, unless it ends at a stop string)")
        self._warn()

    def _record(self, prompt: EncodedPrompt, tokens: list[int]) -> None:
        """Add the answer to the history, and write the file."""
        assert prompt.conversation is not None
        template = self.encoder.renderer.templates.of(prompt.conversation)
        answer = answer_message(self.encoder.tokenizer, template, prompt.text, tokens)
        self.session.answer(answer)

    def _warn(self) -> None:
        """Print what the template left out of the conversation, each kind once."""
        for line in self.encoder.renderer.strictness.tally.take().warnings():
            kind = re.sub(r"\d+", "", line)
            if kind not in self._warned:
                self._print(f"({line})")
            self._warned.add(kind)

    def _cut(self, limit: int) -> str:
        if limit == self.limits.positions:
            return f"(cut: {self.limits.rule}; /clear or /drop makes room)"
        if self.limits.room is not None:
            return f"(cut after {self.limits.room} tokens; generation_config.max_new_tokens is it)"
        return "(cut at the configured length: generation_config.max_new_tokens or max_length)"

    def _too_long(self, length: int) -> None:
        """Explain why a question has no answer; it is kept."""
        rule = self.limits.rule
        if len(self.session.turns) <= self.session.left_out:  # nothing else is read
            self.terminal.prefill(self._kept)
            raise UserError(
                f"the question has {length} tokens with the system prompt",
                rule=rule,
                advice="Shorten it: it is the next line",
            )
        raise UserError(
            f"the conversation has {length} tokens with this question",
            rule=rule,
            advice="Your question is kept: /drop leaves the oldest turns out of what the model "
            "reads and answers it, /clear answers it in a new conversation",
        )

    def _system(self, text: str) -> None:
        if not text:
            self._print(self.session.system or "(there is no system prompt)")
            return
        before = self.session.conversation
        self.session.set_system(text)
        trial = self.session.prompt()
        question: Turn = {"role": "user", "content": "question"}
        try:  # some templates have no place for it
            self.encoder.encode_conversation(replace(trial, messages=[*trial.messages, question]))
        except UserError:
            self.session.conversation = before
            raise
        self._print("(the system prompt counts from the next answer on)")

    def _retry(self, _: str) -> None:
        if not self.session.take_back_answer():
            raise UserError("there is no answer yet", advice="Ask a question first")
        if not self.limits.settings.do_sample:
            self._print("(greedy decoding answers the same: generation_config.do_sample is False)")
        self._answer()

    def _clear(self, _: str) -> None:
        self.session.clear()
        self._print("(a new conversation)")
        self._ask_kept()

    def _drop(self, _: str) -> None:
        """Leave out as few turns as make room for the question and an answer."""
        self.session.ask(self._kept or "?")
        try:
            cut = self._cut_that_fits()
        finally:
            self.session.take_back_question()
        self.session.left_out = cut
        count = len(self.session.turns)
        self._print(f"(the model no longer reads the {cut} oldest of {count} turns)")
        self._ask_kept()

    def _cut_that_fits(self) -> int:
        """How many of the oldest turns to leave out: all but the question where no fewer do."""
        cuts, longest = self.session.cuts(), self.limits.longest
        if not cuts:
            raise UserError("there is no turn to leave out", rule="the model reads the question")
        for cut in cuts:
            prompt = self.encoder.encode_conversation(self.session.prompt(left_out=cut))
            if longest is None or len(prompt.ids) + longest // _ANSWER_SHARE <= longest:
                return cut
        return cuts[-1]

    def _ask_kept(self) -> None:
        if self._kept:
            self._print(f"> {self._kept}")
            self._ask(self._kept)

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file", advice="Write /save chat.jsonl")
        self._print(f"(written: {self.session.save(name)})")

    def _print(self, text: str) -> None:
        self.terminal.write(f"{text}\n")
