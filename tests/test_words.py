"""Code, messages and pages use the field's words: none of those that were replaced comes back."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPLACED = {
    "say, says, said, tell, tells, told": "log, print, report, list, warn",
    "whole, wholeness, whole_source, newest_whole": "complete, valid, full",
    "mend, mends, mended": "fix, correct",
    "anew": "again",
    "let go": "remove, release",
    "of ours": "Slipway's",
    "stands": "is",
    "wish, wishes": "request, reason to stop",
    "sight": "visibility, attention mask",
    "settle, settles, settled": "finish, resolve, materialize",
    "receipt": "resume report",
    "ailment": "health issue",
    "leftovers": "cleanup",
    "mates": "peers",
    "found_by_all": "on_all_ranks",
    "equalise_copies": "sync_tied_weights",
    "fill_weights": "load_or_init",
    "fan_out": "copy_to_tp",
    "keep_piece": "split",
    "patiently": "with_long_timeout",
    "none_collected": "gc_paused",
    "keepers": "writer ranks",
    "handover": "rank0 first",
}
"""Words, and what the field calls it."""

WORDS = {word.strip(): better for words, better in REPLACED.items() for word in words.split(",")}
PATTERN = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, WORDS))})(?![\w-])", re.IGNORECASE)
FILES = [
    *(path for room in ("launcher", "models") for path in sorted((ROOT / room).rglob("*.py"))),
    *(ROOT / name for name in ("run.py", "msrun.sh", "README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_words_of_the_field() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[1]!r}: {WORDS[match[1].lower()]}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in PATTERN.finditer(line)
    ]
    assert not found, "\n".join(found)
