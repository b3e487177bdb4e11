"""One golden file, tests/messages.golden, holds the full wording of messages.

A test asserts what a message is about: its key, place, value and nearest right value. The sentence
around them is compared with the golden file, so that better wording costs one line of a diff.
After a change of wording, write the entries of the tests that run with

    SLIPWAY_UPDATE_MESSAGES=1 python -m pytest -n 0 tests/...

and read the diff. An entry is a line `## group: case` and the text below it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

GOLDEN = Path(__file__).with_name("messages.golden")
UPDATE = "SLIPWAY_UPDATE_MESSAGES"


def check(group: str, case: str, text: str) -> None:
    """Compare `text` with the entry of this case; with SLIPWAY_UPDATE_MESSAGES=1, write it."""
    name, text = _name(group, case), text.strip("\n")
    if os.environ.get(UPDATE):
        _update({name: text})
        return
    hint = f"no entry {name!r} in {GOLDEN.name}: run the test with {UPDATE}=1"
    assert name in _golden(), hint
    assert text == _golden()[name], f"another wording of {name!r}: {UPDATE}=1 writes it"


def check_cases(group: str, cases: Iterable[str]) -> None:
    """The golden file has an entry for each of these cases of a group, and no other."""
    expected = {_name(group, case) for case in cases}
    known = {name for name in _golden() if name.startswith(f"{group}: ")}
    if os.environ.get(UPDATE):
        _update(dict.fromkeys(known - expected))
        return
    assert known == expected


def nearest(line: str) -> tuple[str, ...]:
    """The right values that one error names: `did you mean`, `Nearest` or `It belongs to`."""
    if found := re.search(r"did you mean `([^`]+)`", line):
        return (found[1],)
    found = re.search(r"(?:Nearest:(?: [a-z_]+(?= ))?|It belongs to) (.*?)\.(?: |$)", line)
    return tuple(found[1].split(" or ")) if found else ()


def _name(group: str, case: str) -> str:
    return f"{group}: {case.encode('unicode_escape').decode()}"


@functools.cache
def _golden() -> dict[str, str]:
    return _parse(GOLDEN.read_text(encoding="utf-8"))


def _parse(content: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", content, flags=re.MULTILINE)[1:]
    return {name: text.strip("\n") for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _update(changes: dict[str, str | None]) -> None:
    """Write these entries and remove those of None; safe with several test processes."""
    with GOLDEN.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        entries = _parse(file.read()) | changes
        kept = sorted((name, text) for name, text in entries.items() if text is not None)
        file.truncate(0)
        file.write("\n\n".join(f"## {name}\n{text}" for name, text in kept) + "\n")
