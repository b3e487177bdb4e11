"""Which columns of MindRecord files are the tokens, labels and loss mask of a row.

Owns the names that need no configuration. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import Problem, UserError, did_you_mean
from launcher.mindspore.mindrecord.header import Header, nearest_field

KNOWN = {
    "input_ids": ("input_ids",),
    "labels": ("labels", "target_ids"),
    "loss_mask": ("loss_mask",),
}
"""What a row is made of -> the columns that are taken for it where `columns` is not set."""


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


def choose_columns(written: Mapping[str, str] | None, header: Header) -> Columns:
    """The columns that `data_loader.columns` names, else those of known names.

    Raises UserError for a column that the file does not have, or whose type does not fit.
    """
    chosen = dict(written or _found(header))
    if found := [problem for item in chosen.items() if (problem := _problem(*item, header))]:
        raise UserError(found)
    if "input_ids" not in chosen:
        raise UserError(
            "no column with tokens is known",
            where=str(header.path),
            rule="a row needs input_ids",
            nearest=f"Its columns: {', '.join(header.by_name)}",
            advice="Set data_loader.columns.input_ids to one of them",
        )
    return Columns(**chosen)


def _found(header: Header) -> dict[str, str]:
    found = {
        argument: next((name for name in names if name in header.by_name), None)
        for argument, names in KNOWN.items()
    }
    return {argument: name for argument, name in found.items() if name is not None}


def _problem(argument: str, name: str, header: Header) -> Problem | None:
    """What is wrong with a column for a part of a row."""
    field = header.by_name.get(name)
    if argument not in KNOWN:
        return Problem(
            what=f"data_loader.columns.{argument}: a row has no {argument}",
            rule=f"a row is made of {', '.join(KNOWN)}",
            nearest=did_you_mean(argument, KNOWN),
        )
    if field is None:
        return Problem(
            what=f"the file has no column {name!r}, which data_loader.columns.{argument} names",
            where=str(header.path),
            rule="every column that is asked for is in the files",
            nearest=nearest_field(name, header),
        )
    if field.is_integers or (argument == "loss_mask" and field.shape is not None):
        return None
    shape = "" if field.shape is None else f" {list(field.shape)}"
    return Problem(
        what=f"the column {name!r} for {argument} is {field.type}{shape}",
        where=str(header.path),
        rule="tokens and labels are arrays of int32 or int64, a loss mask is an array of numbers",
        advice="Choose another column with data_loader.columns",
    )
