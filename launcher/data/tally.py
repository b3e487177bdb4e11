"""Counts of what is ignored, dropped or replaced in a dataset.

Owns the warnings about a dataset. Invariant: whatever is left out between a file and a row is
counted here, with the first place where it occurred.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields

from launcher.errors import did_you_mean
from launcher.json_text import printable

MAX_NAMES = 20
"""Names in one warning."""


@dataclass
class Places:
    """In how many records, files or samples something occurred, and the first of them."""

    count: int = 0
    first: str = ""
    last: str = ""

    def add(self, where: str) -> None:
        """Count the place `where`; the same place several times in a row counts once."""
        if where != self.last or not self.count:
            self.count += 1
            self.first = self.first or where
            self.last = where

    def merge(self, later: Places) -> None:
        """Count the places of `later`, which were added after those of this one."""
        if later.count:
            self.count += later.count - (self.count > 0 and later.first == self.last)
            self.first = self.first or later.first
            self.last = later.last

    def __len__(self) -> int:
        return self.count


@dataclass
class NamedPlaces:
    """Places by name, and for all names together."""

    all: Places = field(default_factory=Places)
    by_name: dict[str, Places] = field(default_factory=dict)

    def add(self, name: str, where: str) -> None:
        """Count `name` at the place `where`."""
        self.all.add(where)
        self.by_name.setdefault(name, Places()).add(where)

    def merge(self, later: NamedPlaces) -> None:
        """Count what was added to `later` after this one."""
        self.all.merge(later.all)
        for name, places in later.by_name.items():
            self.by_name.setdefault(name, Places()).merge(places)

    def line(self, what: str, known: Collection[str] = ()) -> list[str]:
        """One warning with every name, or none; `known`: names to suggest instead."""
        if not self.all.count:
            return []
        parts = [_part(name, places, known) for name, places in self.by_name.items()]
        hidden = len(parts) - MAX_NAMES
        more = f", and {hidden} other name(s)" if hidden > 0 else ""
        return [f"warning: {self.all.count} record(s) {what}: {', '.join(parts[:MAX_NAMES])}{more}"]


def _part(name: str, places: Places, known: Collection[str]) -> str:
    short = printable(name) if len(name) <= 60 else printable(name[:57]) + "..."
    inside, dot, bare = name.rpartition("].")
    others = [other.removeprefix(inside + dot) for other in known if other.startswith(inside + dot)]
    near = did_you_mean(bare, others, cutoff=0.75)
    hint = f"; {near}" if near else ""
    return f"`{short}` ({places.count}, first in {places.first}{hint})"


@dataclass(kw_only=True)
class Tally:
    """What was read, and what was left out or replaced."""

    documents: int = 0
    empty_documents: int = 0
    records_without_text: Places = field(default_factory=Places)
    """Records whose text column is absent or null."""
    undecodable_files: Places = field(default_factory=Places)
    """Files with bytes that cannot be decoded; with line and offset of the first byte."""
    replaced_characters: int = 0
    files_with_null: Places = field(default_factory=Places)
    """Text files with the character U+0000."""
    unused_fields: NamedPlaces = field(default_factory=NamedPlaces)
    """Fields of records that are not used."""
    known_fields: set[str] = field(default_factory=set)
    """Fields of the formats that were read, to suggest instead of the unused ones."""
    hidden_fields: NamedPlaces = field(default_factory=NamedPlaces)
    """Fields that the chat template does not show."""
    dropped_thoughts: Places = field(default_factory=Places)
    """Conversations with thoughts that the chat template leaves out."""
    dropped_thoughts_turns: int = 0
    """Answers whose thoughts these are."""
    other_context: NamedPlaces = field(default_factory=NamedPlaces)
    """Answers behind other tokens than predict feeds before them, by reason."""
    without_end_mark: Places = field(default_factory=Places)
    """Conversations with an answer behind which the chat template writes no special token."""
    skipped_checks: NamedPlaces = field(default_factory=NamedPlaces)
    """Fields with wrong values that `strict_fields: False` ignores."""
    without_target: Places = field(default_factory=Places)
    """Conversations without an answer to train on."""
    answer_beyond_row: Places = field(default_factory=Places)
    """Conversations whose answers begin after `seq_length`."""
    equal_answers: Places = field(default_factory=Places)
    """Pairs whose two answers are the same."""
    too_short: Places = field(default_factory=Places)
    """Documents of fewer than two tokens."""

    def merge(self, later: Tally) -> None:
        """Count what was counted in `later` after this one: as if both were one tally."""
        for item in fields(self):
            mine, other = getattr(self, item.name), getattr(later, item.name)
            if isinstance(mine, Places | NamedPlaces):
                mine.merge(other)
            elif isinstance(mine, set):
                mine.update(other)
            else:
                setattr(self, item.name, mine + other)

    def take(self) -> Tally:
        """What was counted so far, which is zero from now on."""
        taken = Tally(**{item.name: getattr(self, item.name) for item in fields(self)})
        empty = Tally()
        for item in fields(self):
            setattr(self, item.name, getattr(empty, item.name))
        return taken

    def warnings(self, seq_length: int = 0) -> list[str]:
        """One line for each kind of loss; `seq_length` is that of the rows."""
        return [
            *self._about_files(),
            *self.unused_fields.line("have fields that are not used", self.known_fields),
            *self.hidden_fields.line("have fields that the chat template does not show"),
            *self._about_thoughts(),
            *self.other_context.line("train on an answer behind other tokens than in predict"),
            *_samples(
                self.without_end_mark,
                "have an answer behind which the chat template writes no end token: that "
                "generation stops there is not learnt",
            ),
            *self.skipped_checks.line("have wrong fields, ignored with strict_fields: False"),
            *_samples(self.without_target, "without an answer to train on were left out"),
            *_samples(
                self.answer_beyond_row,
                f"with no answer within seq_length {seq_length} were left out",
            ),
            *_samples(self.equal_answers, "have the same answer as chosen and as rejected"),
            *_samples(self.too_short, "with fewer than two tokens have no target"),
        ]

    def _about_thoughts(self) -> list[str]:
        if not self.dropped_thoughts:
            return []
        return [
            f"warning: the chat template leaves out the thoughts of {self.dropped_thoughts_turns} "
            f"answer(s) in {self.dropped_thoughts.count} record(s); the first is "
            f"{self.dropped_thoughts.first}"
        ]

    def _about_files(self) -> list[str]:
        lines = []
        if self.undecodable_files:
            lines.append(
                f"warning: {self.undecodable_files.count} file(s) are not valid UTF-8: "
                f"{self.replaced_characters} character(s) were replaced by U+FFFD; "
                f"the first file is {self.undecodable_files.first}"
            )
        if self.files_with_null:
            lines.append(
                f"warning: {self.files_with_null.count} file(s) have the character U+0000, "
                f"as binary files do; the first is {self.files_with_null.first}"
            )
        if self.records_without_text:
            lines.append(
                f"warning: {self.records_without_text.count} record(s) have no text in the text "
                f"column and were left out; the first is {self.records_without_text.first}"
            )
        if self.empty_documents:
            lines.append(f"note: {self.empty_documents} empty document(s) were left out")
        return lines


def _samples(places: Places, what: str) -> list[str]:
    if not places:
        return []
    return [f"warning: {places.count} sample(s) {what}; the first is {places.first}"]
