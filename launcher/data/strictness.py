"""How unknown and wrong fields of a record are handled.

Owns the rule: known fields are used, unknown ones are counted under their name, wrong ones are
errors with file and record, or are counted with `strict_fields: False`.
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

LENIENT = "Fix the record, or ignore such fields with data_loader.strict_fields: False"


@dataclass(frozen=True, kw_only=True)
class Strictness:
    """Whether wrong fields are errors, and where ignored ones are counted."""

    strict: bool
    tally: Tally

    def wrong(self, error: UserError, name: str, where: str) -> None:
        """Raise `error`, or count the field `name` as ignored."""
        if self.strict:
            raise error
        self.tally.skipped_checks.add(name, where)

    def check_fields(
        self, record: Record, owner: Mapping[str, Any], used: Collection[str], inside: str = ""
    ) -> None:
        """Check the fields that are not used, of a record or of one of its turns (`inside`)."""
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

    def is_target(self, record: Record, owner: Mapping[str, Any], inside: str = "") -> bool | None:
        """Whether a record or a turn counts for the loss by its weight; None without one."""
        weights: dict[str, bool] = {}
        for name in WEIGHTS:
            value = owner.get(name)
            if value is None:
                continue
            full = f"{inside}{name}"
            if isinstance(value, (bool, int, float)) and value in (0, 1):
                weights[full] = bool(value)
            else:
                rule = "it must be 0 or 1 (false or true): other loss weights are not supported"
                self.wrong(wrong_field(record.where, full, value, rule), name, record.where)
        if len(set(weights.values())) > 1:
            names = ", ".join(f"{name} = {int(value)}" for name, value in weights.items())
            raise UserError(
                f"{names}",
                where=record.where,
                rule="the weights of an answer must agree",
                advice="Fix the record",
            )
        return next(iter(weights.values()), None)


def is_absent(value: Any) -> bool:
    """Whether an optional field has no value; 0 and {} are wrong values instead."""
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
    """The error for a string that cannot be encoded, and so not be tokenized."""
    return UserError(
        f"field {name!r} has {wrong}, half of a surrogate pair",
        where=where,
        rule="a string must be Unicode that UTF-8 can encode",
        advice="Fix the record (it was cut inside a character), or remove it",
    )
