"""Mixtures that change from one start of a run to the next."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from launcher.builders.mixture_resume import continued, to_json
from launcher.config.provenance import Provenance
from launcher.data.mixture import (
    MixtureOrder,
    Portion,
    SourceOrder,
    mixture_order,
    source_seed,
)
from launcher.errors import UserError

ROWS = {"a": 11, "b": 30, "c": 7, "d": 5}


def order_of(weights: Mapping[str, float], **changes: dict[str, Any]) -> MixtureOrder:
    """A fresh order; `changes`: fields of the sources."""
    sources = [
        SourceOrder(name, ROWS[name], f"hash of {name}", source_seed(3, name), True)._replace(
            **changes.get(name, {})
        )
        for name in weights
    ]
    portions = {name: Portion(ROWS[name], weight) for name, weight in weights.items()}
    return mixture_order(sources, portions, 3)


def state(order: MixtureOrder) -> dict[str, Any]:
    """As it is read from a state file."""
    entry: dict[str, Any] = json.loads(json.dumps(to_json(order), sort_keys=True))
    return entry


def draws(order: MixtureOrder, first: int, behind: int) -> list[tuple[str, int]]:
    """(name, row of the source) of samples."""
    starts, found = 0, []
    rows = order.rows(np.arange(first, behind))
    bounds = {}
    for source in order.sources:
        bounds[source.name] = (starts, starts + source.rows)
        starts += source.rows
    for row in rows.tolist():
        (name,) = (n for n, (low, high) in bounds.items() if low <= row < high)
        found.append((name, row - bounds[name][0]))
    return found


def by_source(samples: list[tuple[str, int]]) -> dict[str, list[int]]:
    return {name: [row for n, row in samples if n == name] for name in ROWS}


def test_the_same_weights_continue_the_order() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    alone = draws(order_of(weights), 0, 200)
    for stop in range(0, 200, 7):
        order, entry, changes = continued(
            order_of(weights), state(order_of(weights)), stop, Provenance()
        )
        assert draws(order, stop, 200) == alone[stop:]
        assert not changes
        assert entry == to_json(order_of(weights))


def test_each_source_continues_after_what_was_taken_from_it() -> None:
    """Three parts with other weights: each source has the samples of a run of its own, in order; a
    resume inside the last part is exact."""
    parts = [
        (0, {"a": 0.5, "b": 0.3, "c": 0.2}),
        (37, {"a": 0.1, "b": 0.6, "c": 0.3}),
        (90, {"a": 2, "b": 1, "c": 1}),
    ]
    order, found = order_of(parts[0][1]), []
    for (first, weights), end in zip(parts, (37, 90, 160), strict=True):
        if first:
            order, _, changes = continued(order_of(weights), state(order), first, Provenance())
            assert len(changes) == 3
        found += draws(order, first, end)
        for stop in (first, end - 3):
            again = continued(order_of(weights), state(order), stop, Provenance())[0]
            assert draws(again, stop, end) == draws(order, stop, end)
            assert again.segments == order.segments
    assert [segment.from_sample for segment in order.segments] == [0, 37, 90]
    for name in "abc":
        alone = [row for _, row in draws(order_of({name: 1}), 0, 160)]
        mixed = by_source(found)[name]
        assert mixed == alone[: len(mixed)]
        assert order.segment.taken[name] + 70 >= len(mixed)
    assert order.taken(160) == [len(by_source(found)[name]) for name in "abc"]


def test_sources_come_go_and_come_back() -> None:
    first = order_of({"a": 0.5, "b": 0.5})
    before = by_source(draws(first, 0, 20))
    second, entry, changes = continued(
        order_of({"a": 0.5, "d": 0.5}), state(first), 20, Provenance()
    )
    assert changes == [
        "a: 0.5 -> 0.5, unchanged, continues after 10 samples",
        "b: 0.5 -> removed, after 10 samples",
        "d: new with 0.5, from its first sample",
    ]
    assert entry["sources"].keys() == {"a", "b", "d"}
    between = by_source(draws(second, 20, 40))
    third, _, changes = continued(
        order_of({"b": 0.5, "a": 0.5}), json.loads(json.dumps(entry)), 40, Provenance()
    )
    assert changes[1] == "b: back with 0.5, continues after 10 samples"
    after = by_source(draws(third, 40, 60))
    alone = {n: [row for _, row in draws(order_of({n: 1}), 0, 60)] for n in "abd"}
    assert before["a"] + between["a"] + after["a"] == alone["a"][:30]
    assert before["b"] + after["b"] == alone["b"][:20]
    assert between["d"] == alone["d"][:10]


def test_samples_before_the_newest_weights_are_refused() -> None:
    order = continued(
        order_of({"a": 1, "b": 3}), state(order_of({"a": 1, "b": 1})), 40, Provenance()
    )[0]
    with pytest.raises(ValueError, match="sample 39 is before 40"):
        order.rows([39])


SAVED = {"a": 0.5, "b": 0.5}
Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("changes", "named", "why"),
    [
        ({"a": {"content": "other"}}, "a", "the content"),
        ({"b": {"content": "other", "rows": 31}}, "b", "30 rows -> 31"),
        ({"b": {"shuffle": False}}, "b", "shuffle: True -> False"),
        ({"b": {"settings": {"packing_strategy": "concatenate"}}}, "b", "None -> concatenate"),
    ],
)
def test_other_data_of_a_source_is_an_error(changes, named: str, why: str) -> None:
    places = Provenance({"train_dataset.data_loader": "x.yaml:7"})
    with pytest.raises(UserError) as caught:
        continued(order_of(SAVED, **changes), state(order_of(SAVED)), 8, places)
    (problem,) = caught.value.problems
    assert problem.where == "x.yaml:7"
    assert f"`{named}`" in problem.what
    assert why in problem.what
    assert "ignore_data_skip" in problem.advice


def test_a_renamed_source_is_an_error() -> None:
    renamed = order_of({"a": 0.5, "c": 0.5}, c={"content": "hash of b"})
    with pytest.raises(UserError, match="source `c` has the data of `b` before") as caught:
        continued(renamed, state(order_of(SAVED)), 8, Provenance())
    assert caught.value.problems[0].nearest == "Nearest: name: b"


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.pop("segments"),
        lambda entry: entry["segments"].clear(),
        lambda entry: entry["segments"][0].pop("weights"),
        lambda entry: entry["segments"][0]["weights"].clear(),
        lambda entry: entry["segments"][0]["weights"].update(a=0),
        lambda entry: entry["segments"][0]["weights"].update(a=10**12),
        lambda entry: entry["segments"][0]["weights"].update(a="x"),
        lambda entry: entry["segments"][0].update(from_sample=99),
        lambda entry: entry["segments"][0].update(taken={"a": -1}),
        lambda entry: entry["segments"][0].update(taken=[3]),
        lambda entry: entry.update(sources={"a": None}),
        lambda entry: entry.update(sources=[]),
    ],
)
def test_a_damaged_state_is_an_error(damage: Change) -> None:
    entry = state(order_of(SAVED))
    damage(entry)
    with pytest.raises(UserError, match=r"mixture in the state file .* is damaged"):
        continued(order_of(SAVED), entry, 8, Provenance())
