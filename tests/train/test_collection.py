"""When Python's garbage collector runs during training."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from launcher.train.collection import collected_every


class Cycle:
    """Garbage that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """The collector on and nothing frozen, and afterwards as the tests have it."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.enable()
    yield
    gc.enable()
    if frozen:
        gc.freeze()


@pytest.mark.parametrize(
    ("told", "freed"),
    [
        ([1, 2, 3, 4, 5, 6], [False, False, True, False, False, True]),
        # sinks of four steps, and a run that was resumed at step 4
        ([4, 8, 12], [False, True, True]),
        ([5, 6, 7], [False, True, False]),
    ],
)
def test_the_collector_runs_after_multiples_of_gc_freq(told: list[int], freed: list[bool]) -> None:
    with collected_every(3) as collect:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        for step, expected in zip(told, freed, strict=True):
            garbage = weakref.ref(Cycle())
            collect(step)
            assert (garbage() is None) == expected, step
            gc.collect()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_it_is_afterwards_as_before() -> None:
    with pytest.raises(ValueError, match="x"), collected_every(3):
        raise ValueError("x")
    assert gc.isenabled()
    gc.disable()
    with collected_every(3):
        pass
    assert not gc.isenabled()


def test_what_another_part_of_the_program_froze_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collected_every(3):
        assert not gc.isenabled()
    assert frozen > 0
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_without_gc_freq_python_decides() -> None:
    with collected_every(0) as collect:
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
        collect(50)
