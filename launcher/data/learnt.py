"""Which turns of a conversation count for the loss.

Owns the rule, from the weakest to the strongest: `train_on_roles` and `train_on_turns` of the data
loader, the weight of a record, the weight of a turn (`weights` lists the fields). A weight of 0
makes a turn context; a weight of 1 makes a turn count that `train_on_turns: last` leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.config.schema import DataLoaderSection
from launcher.data.records import Record, shown
from launcher.data.strictness import LENIENT, Strictness
from launcher.errors import UserError


@dataclass(frozen=True)
class LearntTurns:
    """The turns of a data set that count for the loss without weights."""

    roles: frozenset[str] = frozenset({"assistant"})
    last_only: bool = False
    """Only the last turn of these roles."""

    def context(
        self, roles: Sequence[str], marks: Sequence[bool | None], default: bool | None
    ) -> frozenset[int]:
        """The turns of learnt roles that do not count, given the role and the mark of each turn,
        and the weight of the record."""
        mine = [index for index, role in enumerate(roles) if role in self.roles]
        chosen = mine[-1:] if self.last_only else mine
        return frozenset(
            index
            for index in mine
            if not (
                marks[index]
                if marks[index] is not None
                else index in chosen and default is not False
            )
        )


ASSISTANT_ANSWERS = LearntTurns()
"""All answers of the assistant."""


def learnt_turns(section: DataLoaderSection) -> LearntTurns:
    """The turns that a data loader is set to learn."""
    return LearntTurns(frozenset(section.train_on_roles), section.train_on_turns == "last")


def marks_of(
    record: Record,
    roles: Sequence[str],
    turns: Sequence[Mapping[str, Any]],
    strictness: Strictness,
    learnt: LearntTurns,
) -> list[bool | None]:
    """For each turn, whether its weight makes it count; None without a weight. Raises UserError for
    a weight of 1 of a role that is not learnt."""
    found = []
    for index, (role, turn) in enumerate(zip(roles, turns, strict=True)):
        inside = f"turn {index + 1}: "
        mark = strictness.is_target(record, turn, inside)
        if mark and role not in learnt.roles:
            error = UserError(
                f"{inside}a turn with the role {shown(role)} has a weight of 1",
                where=record.where,
                rule="loss is computed on turns of data_loader.train_on_roles only "
                f"({', '.join(sorted(learnt.roles))})",
                nearest=f"Add {role} to train_on_roles to learn all of its turns",
                advice=LENIENT,
            )
            strictness.wrong(error, "weight", record.where)
        found.append(mark)
    return found
