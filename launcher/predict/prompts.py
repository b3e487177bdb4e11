"""The prompts of a prediction, as given on the command line or in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.data.encoding import NotText, decode, read_bytes
from launcher.errors import UserError
from launcher.json_text import lone_surrogate, printable

_FILE_ENDINGS = (".txt", ".json", ".jsonl", ".md", ".csv")


def read_prompts(input_data: str | Sequence[str] | None) -> list[str]:
    """The prompts of `--predict_data`: one text, several, or a file with one prompt a line.

    In a single text the two characters backslash and n mean a new line; empty lines of a file are
    skipped.
    """
    advice = "Give --predict_data a text, several, or a file with one prompt a line"
    given = [input_data] if isinstance(input_data, str) else list(input_data or [])
    if not given or given == [""]:
        raise UserError("predict needs prompts", advice=advice)
    for prompt in given:
        if wrong := lone_surrogate(prompt):
            raise UserError(
                f"--predict_data {printable(prompt)[:60]!r} has {wrong}",
                rule="a prompt must be valid UTF-8",
                advice=advice,
            )
    if len(given) > 1:
        return given
    text = given[0]
    path = Path(text) if len(text) < 4096 and "\n" not in text and "\0" not in text else Path()
    if _is(path, Path.is_file):
        return _read_file(path)
    if path != Path() and _is(path, Path.is_dir) and (os.sep in text or text in (".", "..")):
        raise UserError(f"--predict_data {text} is a directory", rule="prompts are text, or a file",
                        advice=advice)  # fmt: skip
    if path.suffix in _FILE_ENDINGS and len(text.split()) == 1:
        raise UserError(f"--predict_data {text}: there is no such file", advice=advice)
    return [text.replace("\\n", "\n")]


def _read_file(path: Path) -> list[str]:
    try:
        lines = decode(read_bytes(path)).split("\n")
    except NotText as error:
        raise UserError(
            f"--predict_data {path} is not UTF-8 text",
            where=f"{path}:{error.line}",
            rule="prompts are UTF-8, or UTF-16 or UTF-32 with a byte order mark",
            nearest=f"The byte is at offset {error.offset} of the file",
            advice="Convert the file (iconv -f LATIN1 -t UTF-8)",
        ) from None
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--predict_data {path} is empty", advice="Write one prompt a line")
    return prompts


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """`kind(path)`; False for a text that cannot be a path."""
    try:
        return path != Path() and kind(path)
    except OSError:
        return False
