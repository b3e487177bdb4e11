"""`data_loader.split`: `train`, `train[:100]`, `train[10%:20%]`, `train+test`.

Owns that syntax, which is the one of the `datasets` library (its `ReadInstruction`): parts joined
by `+`, each the name of a split and perhaps a slice in records or in percent. Pure: the number of
records is only known when files are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_PART = re.compile(r"(?P<name>\w+(?:\.\w+)*)(?:\[(?P<slice>[^\[\]]*)\])?")
_BOUND = re.compile(r"(-?\d+)(%?)")

SYNTAX = "a split is a name, perhaps with a slice, as in `train[:100]`, `train[10%:20%]`, `a+b`"


class WrongSplit(ValueError):
    """A text that is not a split; `nearest` is how it could be meant."""

    def __init__(self, rule: str, nearest: str = "") -> None:
        super().__init__(rule)
        self.rule, self.nearest = rule, nearest


@dataclass(frozen=True)
class SplitPart:
    """One part of a split: the records `start` to `stop` of the split `name`."""

    name: str
    start: int | None = None
    stop: int | None = None
    unit: Literal["records", "%"] = "records"

    @property
    def is_all(self) -> bool:
        """Whether every record of the split is taken."""
        return self.start is None and self.stop is None

    @property
    def needs_count(self) -> bool:
        """Whether the number of records must be known before the first one is taken."""
        return self.unit == "%" or (self.start or 0) < 0 or (self.stop or 0) < 0

    def bounds(self, count: int) -> tuple[int, int]:
        """The first record and the one after the last, of `count`.

        A percentage is rounded to the nearest record, halves to the even one; negative bounds count
        from the end.
        """

        def absolute(bound: int | None, default: int) -> int:
            if bound is None:
                return default
            if self.unit == "%":
                bound = round(bound * count / 100)
            return min(max(bound + count if bound < 0 else bound, 0), count)

        start, stop = absolute(self.start, 0), absolute(self.stop, count)
        return start, max(start, stop)

    def __str__(self) -> str:
        if self.is_all:
            return self.name
        sign = "%" if self.unit == "%" else ""
        start, stop = (
            "" if bound is None else f"{bound}{sign}" for bound in (self.start, self.stop)
        )
        return f"{self.name}[{start}:{stop}]"


def parse_split(text: str) -> tuple[SplitPart, ...]:
    """The parts of a split. Raises WrongSplit."""
    return tuple(_part(part.strip()) for part in text.split("+"))


def names_of_split(text: str) -> tuple[str, ...]:
    """The names in a split, each once; the text itself where it is not one."""
    try:
        return tuple(dict.fromkeys(part.name for part in parse_split(text)))
    except WrongSplit:
        return (text,)


def _part(text: str) -> SplitPart:
    found = _PART.fullmatch(text)
    if found is None:
        raise WrongSplit(SYNTAX, _meant(text))
    name, inside = found["name"], found["slice"]
    if inside is None:
        return SplitPart(name)
    if inside.count(":") != 1:
        raise WrongSplit("a slice has the form [start:stop]", _with_colon(name, inside))
    bounds = [_bound(side.strip(), name) for side in inside.split(":")]
    units = {unit for _, unit in filter(None, bounds)}
    if len(units) > 1:
        raise WrongSplit(
            "both ends of a slice are numbers of records, or both are percentages",
            f"did you mean `{name}[{'%:'.join(side.strip(' %') for side in inside.split(':'))}%]`?",
        )
    start, stop = (bound[0] if bound else None for bound in bounds)
    return SplitPart(name, start, stop, "%" if "%" in units else "records")


def _bound(text: str, name: str) -> tuple[int, str] | None:
    if not text:
        return None
    found = _BOUND.fullmatch(text)
    if found is None:
        digits = re.match(r"-?\d+", text)
        near = f"Nearest: `{name}[:{digits[0]}]`" if digits else ""
        raise WrongSplit(f"`{text}` is not an integer or a percentage", near)
    number, unit = int(found[1]), found[2]
    if unit and not -100 <= number <= 100:
        raise WrongSplit("a percentage is between -100% and 100%", "Nearest: 100%")
    return number, unit


def _with_colon(name: str, inside: str) -> str:
    inside = inside.strip()
    if re.fullmatch(r"-?\d+%?", inside):
        return f"did you mean `{name}[:{inside}]`?"
    if found := re.fullmatch(r"(-?\d+%?)\s*(?:-|,|\.\.|:.*:)\s*(\d+%?)", inside):
        return f"did you mean `{name}[{found[1]}:{found[2]}]`?"
    return ""


def _meant(text: str) -> str:
    """How a text with wrong brackets could be meant."""
    found = re.fullmatch(r"(\w+)\s*[\[({]\s*([-\d%:]*)\s*[\])}]?", text)
    if found is None:
        first = re.match(r"\w+", text)
        return f"Nearest: {first[0]}" if first else ""
    inside = found[2] if ":" in found[2] else f":{found[2]}"
    return f"did you mean `{found[1]}[{inside}]`?"
