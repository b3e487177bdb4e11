"""The prompts of a prediction, as given on the command line or in a file.

A prompt is a text, or a conversation that the model answers. Invariants: a file of JSON is read
strictly, and what does not fit is an error with file and line; fields that are not used are
counted in the tally of `strictness`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.prompt_text import looks_like_messages, parse_messages
from launcher.data.conversations import Conversation
from launcher.data.encoding import NotText, decode, read_bytes
from launcher.data.records import MAX_PROBLEMS
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import Problem, UserError
from launcher.json_text import NotJson, line_and_column, lone_surrogate, printable
from launcher.predict.messages import conversation_of, is_message, text_of

_FILE_ENDINGS = (".txt", ".json", ".jsonl", ".ndjson", ".md", ".csv")
_JSON_LINES = (".jsonl", ".ndjson")
_ADVICE = "Give --predict_data a text, several, messages, or a file with one prompt a line"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: a text, or a conversation."""

    text: str = ""
    conversation: Conversation | None = None
    """In place of a text."""
    where: str = ""
    """The file and line, or the option, for errors."""

    @property
    def content(self) -> Any:
        """What is asked, wherever it was read: the text, or the turns with what goes with them."""
        talk = self.conversation
        if talk is None:
            return self.text
        more = [part for part in (talk.tools, dict(talk.template_kwargs)) if part]
        return [talk.messages, *more] if more else talk.messages


def read_prompts(
    input_data: str | Sequence[str] | None, strictness: Strictness | None = None
) -> list[Prompt]:
    """The prompts of `--predict_data`: texts, and files with one prompt a line.

    A text that is JSON with messages is a conversation; files ending in .jsonl or .json have
    conversations and texts as JSON. In a single text the two characters backslash and n mean a new
    line; empty lines of a file are skipped. Raises UserError.
    """
    strictness = strictness or Strictness(strict=True, tally=Tally())
    given = [input_data] if isinstance(input_data, str) else list(input_data or [])
    if not given or given == [""]:
        raise UserError("predict needs prompts", advice=_ADVICE)
    for prompt in given:
        if wrong := lone_surrogate(prompt):
            raise UserError(
                f"--predict_data {printable(prompt)[:60]!r} has {wrong}",
                rule="a prompt must be valid UTF-8",
                advice=_ADVICE,
            )
    if len(given) > 1:
        places = [f"--predict_data, prompt {n}" for n in range(1, len(given) + 1)]
        return [
            prompt
            for text, place in zip(given, places, strict=True)
            for prompt in _of_one_of_several(text, place, strictness)
        ]
    text = given[0]
    path = _path(text)
    if _is(path, Path.is_file):
        return _read_file(path, strictness)
    if path != Path() and _is(path, Path.is_dir) and (os.sep in text or text in (".", "..")):
        raise UserError(f"--predict_data {text} is a directory", rule="prompts are text, or a file",
                        advice=_ADVICE)  # fmt: skip
    if _names_file(text):
        raise _no_file(text)
    if looks_like_messages(text):
        return [_of_text(text, "--predict_data", strictness)]
    return [Prompt(text=text.replace("\\n", "\n"), where="--predict_data")]


def _of_one_of_several(text: str, where: str, strictness: Strictness) -> list[Prompt]:
    """The prompt that a text is, or those of the file that it names by an ending of prompts."""
    if not _names_file(text):
        return [_of_text(text, where, strictness)]
    if not _is(_path(text), Path.is_file):
        raise _no_file(text)
    return _read_file(_path(text), strictness)


def _path(text: str) -> Path:
    """The path that a prompt may be; the empty one for a text that cannot be one."""
    return Path(text) if len(text) < 4096 and "\n" not in text and "\0" not in text else Path()


def _names_file(text: str) -> bool:
    return _path(text).suffix in _FILE_ENDINGS and len(text.split()) == 1


def _no_file(text: str) -> UserError:
    return UserError(f"--predict_data {text}: there is no such file", advice=_ADVICE)


def _of_text(text: str, where: str, strictness: Strictness) -> Prompt:
    """A prompt of the command line."""
    if not looks_like_messages(text):
        return Prompt(text=text, where=where)
    return _of_value(_parsed(text, where), where, strictness)


def _of_value(value: object, where: str, strictness: Strictness) -> Prompt:
    """The prompt of a JSON value. Raises UserError."""
    text = text_of(value, where, strictness)
    if text is not None:
        return Prompt(text=text, where=where)
    return Prompt(conversation=conversation_of(value, where, strictness), where=where)


def _parsed(text: str, where: str) -> object:
    try:
        return parse_messages(text)
    except NotJson as error:
        raise _not_json(error, text, where) from None


def _not_json(error: NotJson, text: str, where: str, line: int = 0) -> UserError:
    """`line`: of the text in its file; 0: it is not a line of a file."""
    nearest = ""
    if error.position is not None:
        row, column = line_and_column(text, error.position)
        where = f"{where}:{line or row}" if where.endswith(_FILE_ENDINGS) else where
        before = text[max(0, error.position - 20) : error.position]
        nearest = f"Column {column}, after {before!r}"
    elif line:
        where = f"{where}:{line}"
    return UserError(
        f"is not valid JSON: {error.reason}",
        where=where,
        rule="messages are JSON, in double quotes",
        nearest=nearest,
        advice='Write [{"role": "user", "content": "..."}]; a file of plain prompts ends in .txt',
    )


def _read_file(path: Path, strictness: Strictness) -> list[Prompt]:
    try:
        text = decode(read_bytes(path))
    except NotText as error:
        raise UserError(
            f"--predict_data {path} is not UTF-8 text",
            where=f"{path}:{error.line}",
            rule="prompts are UTF-8, or UTF-16 or UTF-32 with a byte order mark",
            nearest=f"The byte is at offset {error.offset} of the file",
            advice="Convert the file (iconv -f LATIN1 -t UTF-8)",
        ) from None
    is_json = path.suffix.lower() in (*_JSON_LINES, ".json")
    prompts = _of_json(path, text, strictness) if is_json else _of_lines(path, text)
    if not prompts:
        raise UserError(f"--predict_data {path} is empty", advice="Write one prompt a line")
    return prompts


def _of_lines(path: Path, text: str) -> list[Prompt]:
    return [
        Prompt(text=line.removesuffix("\r"), where=f"{path}:{number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _of_json(path: Path, text: str, strictness: Strictness) -> list[Prompt]:
    """The prompts of a JSON file; its first wrong records are reported together."""
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for where, read in _values(path, text):
        try:
            prompts.append(_of_value(read(), where, strictness))
        except UserError as error:
            problems += error.problems
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise UserError(problems)
    return prompts


def _values(path: Path, text: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each record of a JSON file: its place, and how it is read."""
    if path.suffix.lower() not in _JSON_LINES and text.strip():
        try:
            content = parse_messages(text)
        except NotJson as error:
            if not _has_json_lines(text):
                raise _not_json(error, text, str(path)) from None
        else:
            if isinstance(content, list) and not any(map(is_message, content)):
                for number, value in enumerate(content, 1):
                    yield f"{path}, record {number}", lambda value=value: value
            else:
                yield str(path), lambda: content
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", lambda line=line, number=number: _line(path, line, number)


def _line(path: Path, line: str, number: int) -> object:
    try:
        return parse_messages(line)
    except NotJson as error:
        raise _not_json(error, line, str(path), number) from None


def _has_json_lines(text: str) -> bool:
    """Whether the first line of a text with several is JSON by itself."""
    first, _, rest = text.strip().partition("\n")
    try:
        parse_messages(first)
    except NotJson:
        return False
    return bool(rest)


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """`kind(path)`; False for a text that cannot be a path."""
    try:
        return path != Path() and kind(path)
    except OSError:
        return False
