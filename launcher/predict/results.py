"""The result files of a prediction: the format of MindFormers, and JSON lines next to it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.data.conversations import Conversation
from launcher.errors import UserError
from launcher.predict.generate import Generation
from launcher.report.aside import make_way

RESULT_FILE = "text_generation_result.txt"


def result_text(generations: Sequence[Generation], batch_size: int) -> str:
    """The format of MindFormers: the text of a Python list with one item a batch."""
    batches = [generations[i : i + batch_size] for i in range(0, len(generations), batch_size)]
    return str([{"text_generation_text": [g.text for g in batch]} for batch in batches])


def write_results(generations: Sequence[Generation], path: Path | str, batch_size: int) -> Path:
    """Write the format of MindFormers to `path`, and JSON lines next to it. Returns the path of the
    latter, which ends in `.jsonl`.

    Each file appears complete. Results of an earlier run are renamed to
    `text_generation_result-1.txt` and so on.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        path = path.with_suffix(".txt")
    lines = [json.dumps(_row(g), ensure_ascii=False) for g in generations]
    write_file(path, result_text(generations, batch_size), keeps_earlier=True)
    rows = "".join(f"{line}\n" for line in lines)
    write_file(path.with_suffix(".jsonl"), rows, keeps_earlier=True)
    return path.with_suffix(".jsonl")


def _row(generation: Generation) -> dict[str, Any]:
    """One JSON line: of a conversation also its messages, in the form of training data."""
    conversation = generation.conversation
    row: dict[str, Any] = {} if conversation is None else as_record(conversation)
    return {
        **row,
        "prompt": generation.prompt,
        "text": generation.text,
        "tokens": list(generation.tokens),
    }


def as_record(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a record of the messages format."""
    record: dict[str, Any] = {"messages": conversation.messages}
    if conversation.tools:
        record["tools"] = conversation.tools
    if conversation.template_kwargs:
        record["chat_template_kwargs"] = dict(conversation.template_kwargs)
    return record


def check_writable(path: Path) -> None:
    """Check that the result can be written to `path`. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        probe = path.with_name(f".{path.name}.{os.getpid()}.partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the result cannot be written to {path}",
            rule=str(error.strerror),
            advice="Set save_file to a file in a folder you may write to",
        ) from error


def write_file(path: Path, text: str, *, keeps_earlier: bool = False) -> None:
    """Write a text file, which appears complete. One of the same name is replaced, or renamed
    before where its content differs (`keeps_earlier`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    content = text.encode("utf-8", errors="backslashreplace")
    try:
        partial.write_bytes(content)
        if keeps_earlier:
            make_way(path, content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
