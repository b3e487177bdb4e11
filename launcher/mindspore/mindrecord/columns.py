"""Which columns of MindRecord files are the tokens, labels and loss mask of a row.

Owns the names that need no configuration, and the meaning of `data_loader.column_map` here: where
it is set, no other labels or loss mask are read. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import Problem, UserError, did_you_mean
from launcher.mindspore.mindrecord.header import Header, nearest_field

KEY = "data_loader.column_map"
KNOWN = {
    "input_ids": ("input_ids",),
    "labels": ("labels", "target_ids"),
    "loss_mask": ("loss_mask",),
}
"""What a row is made of -> the columns that are taken for it where no map is given."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a row."""

    input_ids: str
    labels: str | None = None
    loss_mask: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(name for name in (self.input_ids, self.labels, self.loss_mask) if name)

    def unused(self, header: Header) -> list[str]:
        """The columns of a file that are not read."""
        return [name for name in header.by_name if name not in self.names]


def choose_columns(column_map: Mapping[str, str] | None, header: Header) -> Columns:
    """The columns that `data_loader.column_map` names; without it those of known names.

    Raises UserError for a column that the file does not have, or whose type does not fit.
    """
    found = {
        field: next((name for name in names if name in header.by_name), None)
        for field, names in KNOWN.items()
    }
    chosen = {field: name for field, name in found.items() if name is not None}
    if column_map:
        own = {field: name for field, name in chosen.items() if field == "input_ids"}
        chosen = own | dict(column_map)
    wrong = [column_problem(field, name, header) for field, name in chosen.items()]
    if problems := [problem for problem in wrong if problem is not None]:
        raise UserError(problems)
    if "input_ids" not in chosen:
        raise UserError(
            "no column with tokens is known",
            where=str(header.path),
            rule="a row needs input_ids",
            nearest=f"Its columns: {', '.join(header.by_name)}",
            advice=f"Set {KEY}.input_ids to one of them",
        )
    return Columns(**chosen)


def column_problem(
    field: str, name: str, header: Header, option: str | None = None
) -> Problem | None:
    """What is wrong with the column `name` for a field of a row. `option`: where it was written;
    left out, in `column_map`."""
    key = option or f"{KEY}.{field}"
    if field not in KNOWN:
        is_turned = name in KNOWN and field in header.by_name
        return Problem(
            what=f"{key}: a row has no {field}",
            rule=f"a row is made of {', '.join(KNOWN)}",
            nearest=f"did you mean `{name}: {field}`?" if is_turned else did_you_mean(field, KNOWN),
            advice="Write `field that is read: column of the file`",
        )
    column = header.by_name.get(name)
    if column is None:
        return Problem(
            what=f"the file has no column {name!r}, which {key} names",
            where=str(header.path),
            rule="every column that is named is in the files",
            nearest=nearest_field(name, header),
        )
    if column.is_integers or (field == "loss_mask" and column.shape is not None):
        return None
    shape = "" if column.shape is None else f" {list(column.shape)}"
    return Problem(
        what=f"the column {name!r} for {field} is {column.type}{shape}",
        where=str(header.path),
        rule="tokens and labels are arrays of int32 or int64, a loss mask is an array of numbers",
        advice=f"Choose another column with {key}",
    )
