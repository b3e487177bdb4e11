"""Long work on real ranks: how the others wait, and how they learn that it failed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.parallel import long_work
from launcher.parallel import world as worlds
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups
from launcher.parallel.long_work import LongWork
from tests.ranks import run_ranks

BOTH_LEAD = FilesystemGroups(((0,), (1,)))
"""Two file systems, so that both ranks lead."""


def _until(store: Any, key: str) -> None:
    """Wait for a key; `store.wait` would keep the heartbeat from the store."""
    while not store.check([key]):
        time.sleep(0.01)


def _outcome(work: LongWork, fn: Any) -> str:
    try:
        return f"result {work.on_own(fn)}"
    except UserError as error:
        return str(error)
    except KeyboardInterrupt:
        return "interrupted"


def _outcomes() -> list[tuple[str, list[tuple[int, str]]]]:
    """What two ranks get from works that end in every way, and what they saw while they waited."""
    long_work.BEAT_SECONDS = 0.02
    world = worlds.start(force_cpu=True)
    assert world.store is not None
    store = world.store
    found: list[tuple[str, list[tuple[int, str]]]] = []

    def run(fn: Any, filesystems: FilesystemGroups = ONE_FILESYSTEM) -> None:
        seen: list[tuple[int, str]] = []

        def on_wait(rank: int, status: str) -> None:
            seen.append((rank, status))
            if status == "half":
                store.set("half was seen", "1")

        work = LongWork(world, filesystems, what="tokenize", on_wait=on_wait)
        found.append((_outcome(work, lambda: fn(work)), sorted(set(seen))))

    def when_seen(work: LongWork) -> int:
        work.report("half")
        _until(store, "half was seen")
        return 7

    def refuse(work: LongWork) -> None:
        raise UserError("no file", where="x.txt", rule="there is one")

    def full(work: LongWork) -> None:
        raise OSError(28, "No space left on device", "/cache/tokens.bin")

    def interrupt(work: LongWork) -> None:
        raise KeyboardInterrupt

    run(when_seen)
    run(lambda work: world.rank, BOTH_LEAD)
    run(refuse)
    run(full)
    run(interrupt)
    worlds.stop(world)
    return found


def test_every_end_of_the_work_reaches_every_rank() -> None:
    first, second = run_ranks(2, _outcomes)
    assert [text for text, _ in first[:2]] == ["result 7", "result 0"]
    assert [text for text, _ in second[:2]] == ["result 7", "result 1"]
    assert first[0][1] == []
    assert (0, "half") in second[0][1]
    assert first[2][0] == second[2][0] == "x.txt: no file: there is one."
    assert first[3][0] == second[3][0]
    assert "No space left on device (/cache/tokens.bin)" in first[3][0]
    assert first[4][0] == "interrupted"
    assert "rank 0, which has to tokenize, has ended by KeyboardInterrupt" in second[4][0]


def _silence() -> str:
    """The heartbeat of rank 0 stops while its work goes on."""
    world = worlds.start(force_cpu=True)
    assert world.store is not None
    store = world.store
    long_work.BEAT_SECONDS, long_work.SILENCE_SECONDS = 1e6, 0.5

    def hang() -> None:
        _until(store, "complained")
        raise KeyboardInterrupt

    text = _outcome(LongWork(world, ONE_FILESYSTEM, what="tokenize", on_wait=_ignore), hang)
    if world.rank == 1:
        store.set("complained", "1")
    return text


def test_a_leader_without_heartbeat_is_named() -> None:
    _, text = run_ranks(2, _silence)
    assert "rank 0, which has to tokenize, gave no sign of life for " in text
    assert "See the log of rank 0" in text


def _death(folder: str) -> None:
    """Rank 0, which serves the store, dies at its work."""
    long_work.LOST_SECONDS = 0.0
    world = worlds.start(force_cpu=True)
    seen = Path(folder) / "seen"

    def die() -> None:
        while not seen.exists():
            time.sleep(0.01)
        os._exit(1)

    work = LongWork(world, ONE_FILESYSTEM, what="tokenize", on_wait=lambda *_: seen.touch())
    (Path(folder) / "error").write_text(_outcome(work, die))


def test_a_leader_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0:\nthe process died"):
        run_ranks(2, _death, str(tmp_path))
    text = (tmp_path / "error").read_text()
    assert text.startswith("rank 0, which has to tokenize, has ended, or rank 0 has (")


def test_one_process_does_its_work_at_once() -> None:
    from tests.checkpoint.crew import ALONE

    work = LongWork(ALONE, ONE_FILESYSTEM, what="tokenize", on_wait=_ignore)
    before = threading.active_count()
    assert work.on_own(threading.active_count) == before


def _ignore(rank: int, status: str) -> None:
    pass
