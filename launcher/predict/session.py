"""The conversation of a chat: its turns, what the model reads of them, and the file they go to.

Invariants: every turn is kept in the file, also turns that the user left out of the prompt and
conversations before `clear`; the file is complete after each turn, and no other file is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.data.conversations import Conversation, Turn
from launcher.errors import UserError
from launcher.predict.answers import with_answer
from launcher.predict.encode import SYSTEM_ROLES, with_system
from launcher.predict.results import as_record, write_file

CHAT_FILE = "chat.jsonl"


class Session:
    """One chat. Conversations are records of the messages format, one a line of the file."""

    def __init__(self, path: Path, start: Conversation, system: str | None = None) -> None:
        """`path` must be free. `start`: turns of an earlier chat, with its tools."""
        self.path = path
        self._empty = replace(start, messages=[])
        self._ended: list[Conversation] = []
        self.conversation = start
        self.left_out = 0
        """The oldest turns, apart from the system prompt, that the model does not read."""
        if system is not None and not self._system():
            self.set_system(system)

    @property
    def turns(self) -> list[Turn]:
        """The turns apart from the system prompt."""
        return [turn for turn in self.conversation.messages if turn["role"] not in SYSTEM_ROLES]

    @property
    def system(self) -> str:
        """The system prompt; empty where there is none."""
        return "\n".join(turn["content"] for turn in self._system())

    @property
    def waits_for_answer(self) -> bool:
        """Whether the last turn is not an answer."""
        return bool(self.turns) and self.turns[-1]["role"] != "assistant"

    def prompt(self, *, left_out: int | None = None) -> Conversation:
        """What the model reads."""
        begin = self.left_out if left_out is None else left_out
        return self._with_turns(self.turns[begin:])

    def ask(self, text: str) -> None:
        """Add a question."""
        self.conversation = self._with_turns([*self.turns, {"role": "user", "content": text}])

    def answer(self, answer: Turn) -> None:
        """Add an answer, and write the file."""
        self.conversation = with_answer(self.conversation, answer)
        self.write()

    def take_back_question(self) -> str:
        """Remove the last question, which has no answer. Returns its text."""
        *turns, question = self.turns
        self.conversation = self._with_turns(turns)
        return str(question["content"])

    def take_back_answer(self) -> bool:
        """Remove the last answer; False where there is none."""
        turns = self.turns
        if not turns or turns[-1]["role"] != "assistant":
            return False
        self.conversation = self._with_turns(turns[:-1])
        return True

    def clear(self) -> None:
        """Begin a new conversation with the same system prompt and tools."""
        if self.turns:
            self._ended.append(self.conversation)
        self.conversation, self.left_out = self._with_turns([]), 0

    def set_system(self, text: str) -> None:
        """Set the system prompt, from the next answer on; an empty text removes it."""
        turns = replace(self.conversation, messages=self.turns)
        self.conversation = with_system(turns, text) if text else turns

    def cuts(self) -> list[int]:
        """How many of the oldest turns can be left out, from few to many: up to a question."""
        roles = [turn["role"] for turn in self.turns]
        return [n for n, role in enumerate(roles) if role == "user" and n > self.left_out]

    def write(self) -> None:
        """Write all conversations to the file, where there is one with turns."""
        records = [
            *self._ended,
            *([self.conversation] if self.turns else []),
        ]
        if records:
            write_file(self.path, _lines(records))

    def save(self, name: str) -> Path:
        """Write this conversation to a new file. Returns its path; raises UserError."""
        path = Path(name).expanduser()
        if path.exists():
            raise UserError(
                f"{path} exists", rule="a chat overwrites no file", advice="Give another name"
            )
        if not self.turns:
            raise UserError("there is nothing to save", rule="the conversation has no turns")
        try:
            write_file(path, _lines([self.conversation]))
        except OSError as error:
            raise UserError(f"{path} cannot be written", rule=str(error.strerror)) from error
        return path

    def _system(self) -> list[Turn]:
        return [turn for turn in self.conversation.messages if turn["role"] in SYSTEM_ROLES]

    def _with_turns(self, turns: Sequence[Turn]) -> Conversation:
        return replace(self._empty, messages=[*self._system(), *turns])


def _lines(conversations: Sequence[Conversation]) -> str:
    lines = [json.dumps(as_record(found), ensure_ascii=False) for found in conversations]
    return "".join(f"{line}\n" for line in lines)


def free_path(path: Path) -> Path:
    """`path`, or the first of `chat-1.jsonl`, `chat-2.jsonl`, ... that does not exist."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
