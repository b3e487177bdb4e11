"""The order is a permutation in every epoch, never changes, and seeks in O(1)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.data.order import LARGEST_SIZE, GlobalOrder

SEEDS = st.integers(0, 2**63 - 1)


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
@example(size=1, seed=0, epoch=0)
@example(size=2, seed=0, epoch=0)
@example(size=1024, seed=5, epoch=3)
@example(size=1025, seed=5, epoch=3)
@settings(max_examples=150, deadline=None)
def test_an_epoch_has_every_row_once(size: int, seed: int, epoch: int) -> None:
    rows = GlobalOrder(size, seed).rows(np.arange(epoch * size, (epoch + 1) * size))
    assert np.array_equal(np.sort(rows), np.arange(size))


@pytest.mark.parametrize("size", range(1, 70))
def test_every_small_size_is_a_permutation(size: int) -> None:
    for seed in range(3):
        rows = GlobalOrder(size, seed).rows(np.arange(2 * size)).reshape(2, size)
        assert [sorted(epoch) for epoch in rows.tolist()] == [list(range(size))] * 2


@given(size=st.integers(1, 2**40), seed=SEEDS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_large_sizes_stay_inside_and_never_collide(
    size: int, seed: int, data: st.DataObject
) -> None:
    count = min(size, 500)
    first = data.draw(st.integers(0, size - count))
    rows = GlobalOrder(size, seed).rows(np.arange(first, first + count))
    assert rows.min() >= 0
    assert rows.max() < size
    assert len(set(rows.tolist())) == count


@given(size=st.integers(1, 2**45), seed=SEEDS, sample=st.integers(0, 2**50))
@settings(max_examples=60, deadline=None)
def test_one_sample_alone_is_the_sample_among_many(size: int, seed: int, sample: int) -> None:
    order = GlobalOrder(size, seed)
    around = np.arange(max(0, sample - 3), sample + 4)
    assert order.row(sample) == order.rows(around)[around.tolist().index(sample)]


@pytest.mark.parametrize(
    ("size", "seed", "first", "expected"),
    [
        (1, 0, 0, [0, 0, 0, 0, 0]),
        (10, 42, 0, [6, 9, 1, 5, 4]),
        (10, 42, 8, [8, 7, 1, 7, 8]),
        (1_000_003, 42, 0, [276787, 832453, 623703, 767071, 401573]),
        (1_000_003, 42, 1_000_003, [717435, 287945, 297037, 297250, 435219]),
        (2**40, 42, 0, [133696865559, 101496116686, 843751911725, 54188427008, 1026215907660]),
    ],
)
def test_the_formula_never_changes(size: int, seed: int, first: int, expected: list[int]) -> None:
    assert GlobalOrder(size, seed).rows(np.arange(first, first + 5)).tolist() == expected


def test_the_documented_formula_is_the_code() -> None:
    """The docstring's formula in plain Python integers."""
    word, golden = 2**64, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % word
        return x ^ (x >> 31)

    def row(size: int, seed: int, sample: int) -> int:
        epoch, x = divmod(sample, size)
        a = next(a for a in range(1, size + 1) if a * a >= size)
        b = -(-size // a)
        while True:
            right, left = divmod(x, a)
            for number in range(8):
                key = mix((mix((mix((seed + golden) % word) + epoch + golden) % word)
                           + (number + 1) * golden) % word)  # fmt: skip
                if number % 2 == 0:
                    left = (left + mix(right ^ key) % a) % a
                else:
                    right = (right + mix(left ^ key) % b) % b
            x = right * a + left
            if x < size:
                return x

    for size, seed in ((1, 3), (7, 0), (90, 11), (1000, 2**40 + 1)):
        samples = range(0, 3 * size, max(1, size // 17))
        assert [row(size, seed, s) for s in samples] == GlobalOrder(size, seed).rows(
            list(samples)
        ).tolist()


def test_other_epochs_and_other_seeds_give_other_orders() -> None:
    size = 50
    seen = {
        tuple(GlobalOrder(size, seed).rows(np.arange(epoch * size, (epoch + 1) * size)).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(seen) == 400


@pytest.mark.parametrize("size", [2, 3, 5, 64, 100])
def test_every_row_comes_to_every_place_about_equally_often(size: int) -> None:
    epochs = 4000
    rows = GlobalOrder(size, 1).rows(np.arange(epochs * size)).reshape(epochs, size)
    for place in {0, size // 2, size - 1}:
        counts = np.bincount(rows[:, place], minlength=size)
        expected = epochs / size
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert chi_squared < size + 6 * np.sqrt(2 * size)


def test_neighbours_are_not_kept_together() -> None:
    rows = GlobalOrder(100_000, 0).rows(np.arange(100_000))
    correlation = np.corrcoef(rows[:-1], rows[1:])[0, 1]
    assert abs(correlation) < 0.02
    assert np.count_nonzero(np.abs(np.diff(rows)) == 1) < 20


def test_without_shuffle_the_rows_come_as_they_lie() -> None:
    assert GlobalOrder(3, 9, shuffle=False).rows(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_any_shape_and_none() -> None:
    order = GlobalOrder(20, 1)
    assert order.rows(np.arange(12).reshape(3, 4)).tolist() == (
        order.rows(np.arange(12)).reshape(3, 4).tolist()
    )
    assert order.rows([]).shape == (0,)


@pytest.mark.parametrize("size", [0, -1, LARGEST_SIZE + 1])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        GlobalOrder(size, 0)


def test_samples_count_from_zero() -> None:
    with pytest.raises(ValueError, match="count from 0, got -1"):
        GlobalOrder(5, 0).row(-1)
