"""The blend of a mixture: exact shares at every prefix, from any position."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.data.blend import LARGEST_PERIOD, blend, integer_weights

PREFIXES = 10_000

weights_of_many = st.lists(
    st.one_of(st.integers(1, 9), st.integers(1, 5000)), min_size=1, max_size=12
)


@given(weights_of_many)
@example([1])
@example([1, 1])
@example([5000] + [1] * 11)
@example([1] * 12)
@example([7, 5, 3, 1])
@example([10, 10, 1, 1, 1])
def test_every_prefix_is_within_one_sample_of_the_weights(numbers: list[int]) -> None:
    weights = integer_weights([Fraction(n) for n in numbers])
    made, samples = blend(weights), np.arange(PREFIXES)
    sources, found = made.locate(samples)
    for source, weight in enumerate(weights):
        taken = np.cumsum(sources == source)
        deviation = np.abs(taken * made.period - weight * (samples + 1))
        assert (deviation < made.period).all()
        assert (found[sources == source] == np.arange(taken[-1])).all()


@given(weights_of_many, st.integers(0, 10**12))
def test_seeking_is_the_same_as_running_through(numbers: list[int], start: int) -> None:
    made = blend(integer_weights([Fraction(n) for n in numbers]))
    samples = start + np.arange(300)
    sources, found = made.locate(samples)
    before = np.array(made.taken(start))
    for index, (source, number) in enumerate(zip(sources, found, strict=True)):
        assert number == before[source]
        before[source] += 1
        assert made.taken(start + index + 1) == before.tolist()
    assert sum(made.taken(start)) == start


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1,), "0"), ((1, 1), "01"), ((2, 1), "010"), ((1, 2), "101"), ((3, 2), "01010"),
     ((5, 3, 2), "0102010201"), ((6, 1, 1, 1, 1), "0010200340")],
)  # fmt: skip
def test_patterns(weights, expected: str) -> None:
    """Golden: a resumed run depends on them."""
    made = blend(weights)
    assert "".join(map(str, made.pattern)) == expected
    sources, found = made.locate(np.arange(2 * made.period))
    assert (sources[: made.period] == sources[made.period :]).all()
    assert (found[made.period :] - found[: made.period] == np.array(weights)[made.pattern]).all()


@pytest.mark.parametrize(
    ("shares", "weights"),
    [
        (["0.3", "0.7"], (3, 7)),
        (["0.1", "0.2", "0.7"], (1, 2, 7)),
        (["1/3", "2/3"], (1, 2)),
        (["1e-7", "1"], (1, LARGEST_PERIOD - 1)),
        (["4", "4"], (1, 1)),
    ],
)
def test_weights_are_exact_fractions(shares: list[str], weights) -> None:
    assert integer_weights([Fraction(share) for share in shares]) == weights


@given(st.lists(st.integers(1, 10**15), min_size=1, max_size=40))
@example([10**15] + [1] * 39)
@example([LARGEST_PERIOD, 1])
def test_rounded_weights_have_a_bounded_period(numbers: list[int]) -> None:
    weights = integer_weights([Fraction(n) for n in numbers])
    total, period = sum(numbers), sum(weights)
    assert period <= LARGEST_PERIOD
    assert min(weights) >= 1
    for number, weight in zip(numbers, weights, strict=True):
        error = abs(Fraction(weight, period) - Fraction(number, total))
        assert error * LARGEST_PERIOD < len(numbers) + 1


def test_wrong_shares() -> None:
    for wrong in ([], [Fraction(0), Fraction(1)], [Fraction(-1)]):
        with pytest.raises(ValueError, match="above zero"):
            integer_weights(wrong)
