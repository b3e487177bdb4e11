"""What happens to the fields of a record that are unknown or wrong.

Owns the rule: known fields work, unknown ones are counted under their name, wrong ones are errors
with the place of their record, or counted where `strict_fields: False` waves them through.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from launcher.data.fields import METADATA, OTHER_DATA, WEIGHTS
from launcher.data.records import Record, shown
from launcher.data.tally import Tally
from launcher.errors import UserError
from launcher.json_text import lone_surrogate, printable, strings_in

LENIENT = "Repair the record, or pass over such fields with data_loader.strict_fields: False"


@dataclass(frozen=True, kw_only=True)
class Strictness:
    """How the records of a data loader are checked, and where what is passed over is counted."""

    strict: bool
    tally: Tally

    def wrong(self, error: UserError, name: str, where: str) -> None:
        """Raise `error`, or count the field `name` as waved through."""
        if self.strict:
            raise error
        self.tally.skipped_checks.add(name, where)

    def check_fields(
        self, record: Record, owner: Mapping[str, Any], used: Collection[str], inside: str = ""
    ) -> None:
        """Check the fields that nothing reads, of a record or of one of its turns (`inside`)."""
        for name, value in owner.items():
            if name in used or name in METADATA or name in WEIGHTS or is_absent(value):
                continue
            full = f"{inside}{name}"
            kind, belongs = OTHER_DATA.get(name, ("", None))
            if belongs is not None and belongs(value):
                error = wrong_field(record.where, full, value, f"it is {kind}")
                self.wrong(error, full, record.where)
            else:
                self.tally.unused_fields.add(full, record.where)
                self.tally.known_fields.update(f"{inside}{known}" for known in used)

    def is_learnt(self, record: Record, owner: Mapping[str, Any], inside: str = "") -> bool | None:
        """What the weights of a record or of a turn say; None where they say nothing."""
        said: dict[str, bool] = {}
        for name in WEIGHTS:
            value = owner.get(name)
            if value is None:
                continue
            full = f"{inside}{name}"
            if isinstance(value, (bool, int, float)) and value in (0, 1):
                said[full] = bool(value)
            else:
                rule = "it must be 0 or 1 (false or true): an answer is learnt or it is context"
                self.wrong(wrong_field(record.where, full, value, rule), name, record.where)
        if len(set(said.values())) > 1:
            names = ", ".join(f"{name} = {int(value)}" for name, value in said.items())
            raise UserError(
                f"{names}",
                where=record.where,
                rule="one answer is learnt or it is not",
                advice="Repair the record",
            )
        return next(iter(said.values()), None)


def is_absent(value: Any) -> bool:
    """Whether the value of an optional field says nothing; 0 and {} are wrong values instead."""
    return value is None or value == "" or value == []


def names_of(owner: Mapping[str, Any]) -> str:
    """The first names of the fields of a record, for a message."""
    names = [printable(name[:60]) for name in islice(owner, 20)]
    return ", ".join(names) + (", ..." if len(owner) > 20 else "") or "none"


def wrong_field(where: str, name: str, value: Any, rule: str) -> UserError:
    """The error for a field with a value that it cannot have."""
    return UserError(
        f"{printable(name)!r} = {shown(value)}", where=where, rule=rule, advice=LENIENT
    )


def check_encodable(record: Record, value: Any, name: str) -> None:
    """Raise UserError when a text inside `value`, the field `name`, has a lone surrogate."""
    for place, text in strings_in(value, name):
        if wrong := lone_surrogate(text):
            raise surrogate_error(record.where, place, wrong)


def surrogate_error(where: str, name: str, wrong: str) -> UserError:
    """The error for a text that no encoding, and so no tokenizer, takes."""
    return UserError(
        f"field {name!r} holds {wrong}, half of a surrogate pair",
        where=where,
        rule="a text must be Unicode that UTF-8 can encode",
        advice="Repair the record (text was cut in the middle of a character), or take it out",
    )
