"""A mixture in the state of a run, and how a resumed run continues one.

Owns the entry `data.mixture` of state files:

    sources    name -> rows, content (a hash of the rows), shuffle, settings (where there are some)
    segments   from_sample, weights (name -> integer), taken (name -> samples before from_sample)

Sources are matched by name. With the weights of the save, the order is that of the run that saved.
With others a new segment begins: each source continues after the samples taken from it, a new one
at its first, and one that comes back where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from launcher.config.provenance import Provenance
from launcher.data.blend import LARGEST_PERIOD
from launcher.data.mixture import MixtureOrder, Segment
from launcher.errors import Problem, UserError

MIXTURE = "mixture"
"""The key in the metadata of the data."""
_LIST = "train_dataset.data_loader"


def to_json(order: MixtureOrder, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The entry of a state file. `known`: sources of earlier segments, by name."""
    present = {
        source.name: {
            "rows": source.rows, "content": source.content, "shuffle": source.shuffle,
            **({"settings": dict(source.settings)} if source.settings else {}),
        }
        for source in order.sources
    }  # fmt: skip
    return {
        "sources": {**(known or {}), **present},
        "segments": [segment._asdict() for segment in order.segments],
    }


def continued(
    order: MixtureOrder, saved: Mapping[str, Any], position: int, provenance: Provenance
) -> tuple[MixtureOrder, dict[str, Any], list[str]]:
    """The order of a run that continues at global sample `position` after a save with the mixture
    `saved`; its entry in state files; and for the resume report, what has changed.

    Raises UserError where the data of a source is another one.
    """
    try:
        segments = tuple(_segment(entry) for entry in saved["segments"])
        sources = {str(name): dict(entry) for name, entry in saved["sources"].items()}
        before, now = segments[-1], order.segment
        taken = before.taken_before(position)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            "the mixture in the state file of the checkpoint is damaged",
            rule=f"it has sources and segments with integer weights ({error!r})",
            advice="Resume from another checkpoint, or set ignore_data_skip: True",
        ) from error
    _check_content(order, sources, provenance)
    _check_names(order, sources, before, provenance)
    if now.weights == before.weights:
        resumed = replace(order, segments=segments)
        return resumed, to_json(resumed, sources), []
    resumed = replace(order, segments=(*segments, Segment(position, now.weights, taken)))
    return resumed, to_json(resumed, sources), [*_changes(before, resumed.segment)]


def _segment(entry: Mapping[str, Any]) -> Segment:
    weights = {str(name): int(weight) for name, weight in entry["weights"].items()}
    taken = {str(name): int(count) for name, count in entry["taken"].items()}
    if not weights or min(weights.values()) < 1 or sum(weights.values()) > LARGEST_PERIOD:
        raise ValueError(f"weights {weights}")
    if min(taken.values(), default=0) < 0:
        raise ValueError(f"taken {taken}")
    return Segment(int(entry["from_sample"]), weights, taken)


def _check_content(
    order: MixtureOrder, saved: Mapping[str, Mapping[str, Any]], provenance: Provenance
) -> None:
    """Sources of the same name have the same rows in the same order."""
    problems = []
    for source in order.sources:
        before = saved.get(source.name)
        if before is None:
            continue
        if before.get("content") != source.content:
            rows = before.get("rows")
            changed = f"{rows} rows -> {source.rows}" if rows != source.rows else "the content"
        elif before.get("shuffle") != source.shuffle:
            changed = f"shuffle: {before.get('shuffle')} -> {source.shuffle}"
        elif (settings := before.get("settings", {})) != source.settings:
            changed = ", ".join(
                f"{key}: {settings.get(key)} -> {source.settings.get(key)}"
                for key in sorted(settings.keys() | source.settings.keys())
                if settings.get(key) != source.settings.get(key)
            )
        else:
            continue
        problems.append(
            _problem(
                f"source `{source.name}` is not that of the checkpoint ({changed})", provenance,
                rule="a resumed run continues with the same samples in the same order",
                advice="Use the same data, give other data another name, or set ignore_data_skip: "
                "True to begin all sources again",
            )
        )  # fmt: skip
    if problems:
        raise UserError(problems)


def _check_names(
    order: MixtureOrder, saved: Mapping[str, Mapping[str, Any]], before: Segment,
    provenance: Provenance,
) -> None:  # fmt: skip
    """No source has only changed its name: it would begin again, in another order."""
    present = {source.name for source in order.sources}
    gone = {saved.get(name, {}).get("content"): name for name in before.weights.keys() - present}
    renamed = [s for s in order.sources if s.name not in saved and s.content in gone]
    if renamed:
        raise UserError(
            _problem(
                f"source `{source.name}` has the data of `{gone[source.content]}` before",
                provenance,
                rule="a resumed run knows its sources by their names",
                nearest=f"Nearest: name: {gone[source.content]}",
                advice="Keep the name, or set ignore_data_skip: True to begin all sources again",
            )
            for source in renamed
        )


def _problem(
    what: str, provenance: Provenance, *, rule: str, advice: str, nearest: str = ""
) -> Problem:
    return Problem(
        what=what, where=provenance.nearest(_LIST), rule=rule, nearest=nearest, advice=advice
    )


def _changes(before: Segment, now: Segment) -> Iterator[str]:
    """One text for each source whose share has changed."""
    for name in sorted(before.weights.keys() | now.weights.keys()):
        old, new = _share(before, name), _share(now, name)
        taken = now.taken.get(name, 0)
        if name not in now.weights:
            yield f"{name}: {old} -> removed, after {taken} samples"
        elif name in before.weights:
            same = "" if old != new else ", unchanged"
            yield f"{name}: {old} -> {new}{same}, continues after {taken} samples"
        elif taken:
            yield f"{name}: back with {new}, continues after {taken} samples"
        else:
            yield f"{name}: new with {new}, from its first sample"


def _share(segment: Segment, name: str) -> str:
    if name not in segment.weights:
        return ""
    return f"{segment.weights[name] / sum(segment.weights.values()):.4g}"
