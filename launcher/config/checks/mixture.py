"""Rules about lists of data loaders: names, weights, and where they are not possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from launcher.config.checks.check import Check
from launcher.config.derived import is_evaluation, written_datasets
from launcher.config.mixture import NAME, source_names
from launcher.config.provenance import KeyProblem
from launcher.config.schema import MixtureSourceSection

ALL_OR_PART = "Give every source a weight, or weights below 1 together, which are parts of 1"


def mixtures(check: Check) -> Iterator[KeyProblem]:
    """The sources of a mixture have names and weights that fit together."""
    for name, section in written_datasets(check.config).items():
        if not isinstance(section.data_loader, list):
            continue
        key, sources = f"{name}.data_loader", section.data_loader
        yield from _names(check, key, sources)
        if is_evaluation(name):
            yield from _without_weights(check, key, sources)
        else:
            yield from _weights(check, key, sources)


def _names(check: Check, key: str, sources: Sequence[MixtureSourceSection]) -> Iterator[KeyProblem]:
    names = source_names(sources)
    for index, (name, source) in enumerate(zip(names, sources, strict=True)):
        place = f"{key}.{index}"
        if source.name and not NAME.fullmatch(source.name):
            yield check.wrong(
                f"{place}.name",
                "a name has letters, digits, `.`, `_` and `-`: it is a part of the keys of metrics",
            )
        elif (first := names.index(name)) != index:
            own = "" if source.name else ", the end of its path"
            yield check.wrong(
                f"{place}.name",
                f"{key}.{first} has this name too",
                what=f"{place}.name = {name!r}{own}",
                nearest=f"Nearest: {_free(name, names)}",
                advice="Give every source a name of its own",
                also=(place, *(f"{place}.{path}" for path in ("dataset_dir", "dataset_files"))),
            )


def _free(name: str, names: Sequence[str]) -> str:
    number = 2
    while f"{name}-{number}" in names:
        number += 1
    return f"{name}-{number}"


def _without_weights(
    check: Check, key: str, sources: Sequence[MixtureSourceSection]
) -> Iterator[KeyProblem]:
    """An evaluation reads every row once."""
    for index, source in enumerate(sources):
        for name in ("weight", "epochs"):
            if getattr(source, name) is not None:
                yield check.wrong(
                    f"{key}.{index}.{name}",
                    "an evaluation reads every row of every source once",
                    advice=f"Remove {name}; max_samples limits the rows of a source",
                )


def _weights(
    check: Check, key: str, sources: Sequence[MixtureSourceSection]
) -> Iterator[KeyProblem]:
    numbers_are_right = True
    for index, source in enumerate(sources):
        for name in ("weight", "epochs"):
            if not math.isfinite(getattr(source, name) or 0):
                numbers_are_right = False
                yield check.wrong(f"{key}.{index}.{name}", "must be a finite number")
        if source.weight is not None and source.epochs is not None:
            yield check.wrong(
                f"{key}.{index}.epochs",
                "a source has a weight or a number of epochs, which is another way to weigh it",
                also=(f"{key}.{index}.weight",),
                advice="Remove one of them",
            )
    if numbers_are_right:
        yield from _rest(check, key, sources)


def _rest(check: Check, key: str, sources: Sequence[MixtureSourceSection]) -> Iterator[KeyProblem]:
    """Where only some sources have a weight, the weights leave something for the others."""
    weighted = {i: Fraction(str(s.weight)) for i, s in enumerate(sources) if s.weight is not None}
    total = sum(weighted.values())
    if not weighted or len(weighted) == len(sources) or total < 1:
        return
    without = next(index for index in range(len(sources)) if index not in weighted)
    last = max(weighted)
    nearest = ""
    if (left := 1 - (total - weighted[last])) > 0:
        nearest = f"Nearest: {key}.{last}.weight: {float(left / 2):g}"
    yield check.wrong(
        f"{key}.{last}.weight",
        f"the weights add up to {float(total):g}, which leaves nothing for {key}.{without}, "
        "a source without a weight",
        nearest=nearest,
        advice=ALL_OR_PART,
        also=tuple(f"{key}.{index}.weight" for index in range(len(sources))),
    )
