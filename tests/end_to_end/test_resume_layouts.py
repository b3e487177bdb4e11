"""A run goes on, on another layout or on fewer or more ranks, as if it had never stopped.

The same layout is held to the bit in test_resume.py and test_layouts.py. Here: losses within float
rounding, and the samples of every step, their order and their tokens exactly.
"""

from __future__ import annotations

import pytest

from tests.end_to_end.routes import GLOBAL_BATCH, Leg, Samples, Walked, walk
from tests.workshop import Workshop

SAVES = 4
TOLERANCE = 1e-5


def of_all_ranks(ranks: list[Samples], copies: int) -> Samples:
    """The samples of a step over all ranks; each is computed by `copies` ranks, not more."""
    together: Samples = {}
    for samples in ranks:
        together |= samples
    assert sum(map(len, ranks)) == copies * len(together)
    return together


def assert_goes_on(walked: Walked, whole: Walked, leg: Leg, whole_leg: Leg) -> None:
    """Every step of the leg has the losses and the samples of the run that never stopped."""
    assert leg.begins_with is not None
    first = leg.begins_with[1] + 1
    steps = range(first, leg.stop + 1)
    assert list(walked.losses) == list(steps)
    expected = {step: whole.losses[step] for step in steps}
    assert walked.losses == pytest.approx(expected, rel=TOLERANCE)
    assert walked.consumed == {step: step * GLOBAL_BATCH for step in steps}
    for step in steps:
        mine = of_all_ranks(walked.samples[step - first], leg.ranks // leg.dp)
        assert sorted(mine) == [*range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)]
        assert mine == of_all_ranks(whole.samples[step - 1], whole_leg.ranks // whole_leg.dp)


def assert_route(workshop: Workshop, legs: list[Leg], total_steps: int) -> None:
    """The first leg never stops; all others go on from its saves or from each other's."""
    walked = walk(workshop, legs, total_steps, SAVES)
    whole = walked[legs[0].output]
    assert whole.losses[total_steps] < whole.losses[1] - 0.1, "the run must learn something"
    for leg in legs[1:]:
        assert_goes_on(walked[leg.output], whole, leg, legs[0])


CUT = {"dp": 2, "tp": 2, "pp": 2}
FIRST, THIRD, LAST = SAVES, 3 * SAVES, 5 * SAVES
FROM_FIRST, FROM_THIRD = ("whole", FIRST), ("tp4", THIRD)
ON_TP4 = Leg("tp4", THIRD, tp=4, begins_with=FROM_FIRST)
ALONE = Leg("alone", THIRD, begins_with=FROM_FIRST)


def test_three_axes_go_on_with_one_and_alone(workshop: Workshop) -> None:
    assert_route(workshop, [Leg("whole", THIRD, **CUT), ON_TP4, ALONE], THIRD)


@pytest.mark.long
def test_three_axes_go_on_anywhere_and_back(workshop: Workshop) -> None:
    legs = [
        Leg("whole", LAST, **CUT),
        Leg("dp4", THIRD, dp=4, begins_with=FROM_FIRST),
        ON_TP4,
        Leg("pp2_tp2", THIRD, pp=2, tp=2, begins_with=FROM_FIRST),
        ALONE,
        Leg("back", LAST, **CUT, begins_with=FROM_THIRD),
    ]
    assert_route(workshop, legs, LAST)


def world_sizes(*sizes: int) -> list[Leg]:
    """A run that never stops, and one that goes on every few steps with another world size."""
    total = SAVES * len(sizes)
    legs = [Leg("whole", total, dp=sizes[0])]
    before = "whole"
    for number, ranks in enumerate(sizes[1:], start=1):
        output = f"on_{ranks}_{number}"
        step = SAVES * number
        legs.append(Leg(output, step + SAVES, dp=ranks, begins_with=(before, step)))
        before = output
    return legs


@pytest.mark.parametrize(
    "sizes", [(4, 2, 4), pytest.param((8, 4, 2, 8), marks=pytest.mark.long)], ids=str
)
def test_fewer_and_more_ranks_train_on_the_same_samples(workshop: Workshop, sizes) -> None:
    assert_route(workshop, world_sizes(*sizes), SAVES * len(sizes))
