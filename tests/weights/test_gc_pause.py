"""Garbage: the collector rests while plans are made, and only then."""

from __future__ import annotations

import gc
import threading

import pytest

from launcher.weights.gc_pause import gc_paused
from launcher.weights.source import open_complete


def test_the_collector_rests_and_does_again_what_it_did() -> None:
    assert gc.isenabled()
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner one is not the last"
    assert gc.isenabled()


def test_one_that_rested_before_goes_on_to_rest() -> None:
    gc.disable()
    try:
        with gc_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_last_thread_to_leave_lets_it_work_again() -> None:
    inside, may_leave = threading.Barrier(2), threading.Event()

    def stay() -> None:
        with gc_paused():
            inside.wait(600)
            may_leave.wait(600)

    thread = threading.Thread(target=stay)
    with gc_paused():
        thread.start()
        inside.wait(600)
    assert not gc.isenabled(), "one is inside"
    may_leave.set()
    thread.join()
    assert gc.isenabled()


def test_it_works_again_after_an_error(tmp_path) -> None:
    with pytest.raises(Exception, match="holds no weights"):
        open_complete(tmp_path)
    assert gc.isenabled()
