"""Files that hold something else than their name promises: a git-lfs pointer, a web page, a text.

Owns how such a file is recognized, by its first bytes, and the advice for each. Called only for
files that could not be read, and by checks that run before heavy imports: a valid file costs
nothing. The format of a pointer is that of
https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from launcher.errors import Problem, UserError

LOOKED_AT = 512
"""Bytes of a file that are looked at."""
SHORTEST_TEXT = 8
"""Bytes; anything shorter may be a truncated file."""
UNFINISHED_SUFFIXES = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
"""What browsers, aria2 and the Hugging Face client append to a file while it is downloaded."""
HUB_DOWNLOADS = Path(".cache", "huggingface", "download")
"""Where the Hugging Face client keeps what it downloads into a folder until it is complete."""
_POINTER, _POINTER_ID = b"version https://git-lfs", b"\noid sha256:"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error")
_TEXT_SHOWN = 60


def placeholder(path: Path, *, is_text: bool = False) -> Problem | None:
    """The problem with the file at `path` if it is a placeholder; None where it may be the content
    itself, or cannot be read. `is_text`: the content is text, such as JSON or a vocabulary."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return None
            return _recognised(path, file.read(LOOKED_AT), found.st_size, is_text)
    except OSError:
        return None


def refuse_placeholder(path: Path) -> None:
    """Raise `UserError` where the file of weights at `path` is a pointer, a page, another text, or
    empty."""
    found = placeholder(path)
    if found is not None:
        raise UserError(found)


def is_pointer(path: Path) -> bool:
    """Whether a file is a git-lfs pointer, where any content is possible."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            start = file.read(LOOKED_AT)
            return start.startswith(_POINTER) and _POINTER_ID in start
    except OSError:
        return False


def _recognised(path: Path, start: bytes, size: int, is_text: bool) -> Problem | None:
    if not size:
        return Problem(
            what=f"{path} is empty: it has 0 bytes",
            rule=f"a download{'' if is_text else ' or a save'} that was cut off leaves such a file",
            advice="Copy the file again from its origin",
        )  # fmt: skip
    if start.startswith(_POINTER):
        return Problem(
            what=f"{path} is a git-lfs pointer of {size} bytes, not the file itself",
            rule="git without git-lfs downloads only the pointers of large files",
            advice="Run `git lfs install` and `git lfs pull` in its folder, or download the file "
            "with `hf download`",
        )
    if start.lstrip().lower().startswith(_PAGES):
        return Problem(
            what=f"{path} is a web page ({_shown(start)})",
            rule="a server answered with a page, such as a log-in or an error, in place of the "
            "file",
            advice="Download the file itself, with `hf download` or from its `resolve` address",
        )
    if not is_text and _is_text(start):
        return Problem(
            what=f"{path} is a text ({_shown(start)})",
            rule="weights are binary: a server's answer, or another file, has this name",
            nearest=f"Its folder is {path.parent}" if path.suffix == ".json" else "",
            advice="Give the folder or the file of the weights, or copy the file again from its "
            "origin",
        )
    return None


def _is_text(start: bytes) -> bool:
    """Whether it is text, as far as it goes. A protobuf message may begin with a line feed and the
    name of a tensor."""
    if start.startswith((b"\n", b"PK")) or len(start) < SHORTEST_TEXT:
        return False
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < LOOKED_AT - 4:  # not a character that the limit cut in two
            return False
        text = start[: error.start].decode()
    return all(character.isprintable() or character in "\t\n\r" for character in text)


def _shown(start: bytes) -> str:
    text = " ".join(start.decode(errors="replace").split())
    return f"`{text[:_TEXT_SHOWN]}{' ...' * (len(text) > _TEXT_SHOWN)}`"


def unfinished_download(folder: Path, names: Collection[str] = ()) -> str:
    """A sentence about a file in `folder` whose download was not finished, one of `names` where
    these are given; empty where there is none."""
    try:
        found = sorted(
            child.name for child in folder.iterdir()
            if child.suffix in UNFINISHED_SUFFIXES and (not names or child.stem in names)
        )  # fmt: skip
    except OSError:
        return ""
    if not found:
        found = sorted(
            str(file.relative_to(folder)) for file in (folder / HUB_DOWNLOADS).glob("*.incomplete")
        )
    return f"The download of {found[0]} was not finished" if found else ""
