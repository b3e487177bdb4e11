"""An error on one rank is raised on all: the ranks and the advice in its message."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.checkpoint.commit import Commit
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.space import room_for
from launcher.checkpoint.store import Store
from launcher.errors import Problem, UserError
from launcher.layout.mesh import Mesh
from launcher.parallel.all_ranks import (
    RANKS_SHOWN,
    capture_error,
    on_all_ranks,
    raise_if_any_failed,
)
from launcher.parallel.world import World
from tests.checkpoint.crew import ALONE, together

LOST = Problem(what="lost", rule="it must exist", advice="Copy it")


def problems_on_all(ranks: int, work: Callable[[World], object]) -> list[Problem]:
    """The problems of `work`, which must be the same on every rank."""

    def caught(world: World) -> tuple[Problem, ...]:
        with pytest.raises(UserError) as error:
            work(world)
        return error.value.problems

    (problems,) = set(together(ranks, caught))
    return list(problems)


def test_each_rank_gets_its_own_result() -> None:
    assert together(3, lambda w: on_all_ranks(w, pow, w.rank, exp=2)) == [0, 1, 4]


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ({0: "lost", 1: "lost", 2: "lost"}, ["lost"]),
        ({1: "lost"}, ["rank 1: lost"]),
        ({1: "lost", 2: "lost"}, ["rank 1, 2: lost"]),
        ({0: "lost", 2: "other"}, ["rank 0: lost"]),
    ],
)
def test_ranks_are_named_where_not_all_have_a_problem(
    of_ranks: dict[int, str], expected: list[str]
) -> None:
    def read(rank: int) -> None:
        if rank in of_ranks:
            raise UserError(of_ranks[rank], rule="it must exist", advice="Copy it")

    found = problems_on_all(3, lambda world: on_all_ranks(world, read, world.rank))
    assert [problem.what for problem in found] == expected
    assert {(problem.rule, problem.advice) for problem in found} == {(LOST.rule, LOST.advice)}


def test_all_problems_of_the_first_rank_are_shown_and_its_first_peers() -> None:
    def read(rank: int) -> None:
        raise UserError([Problem(what=f"lost {rank}"), Problem(what="late")][rank == 0 :])

    found = problems_on_all(RANKS_SHOWN + 2, lambda world: on_all_ranks(world, read, world.rank))
    assert [problem.what for problem in found] == ["late"]
    found = problems_on_all(2, lambda world: on_all_ranks(world, read, world.rank + 1))
    assert [problem.what for problem in found] == ["rank 0: lost 1", "late"]


def test_only_the_ranks_that_work_count() -> None:
    """Only rank 0 works: all ranks get its results, and messages do not mention rank 0."""

    def on_main(world: World, fn: Callable[[str], int], text: str) -> list[int]:
        outcome = capture_error(fn, text) if world.is_main else None
        return raise_if_any_failed(world, outcome, "not read")

    def lost(text: str) -> int:
        raise UserError([LOST])

    assert together(2, lambda world: on_main(world, int, "7")) == [[7], [7]]
    (problem,) = problems_on_all(2, lambda world: on_main(world, lost, ""))
    assert problem.what == "not read: lost"


def test_a_bug_is_printed_where_it_happens_and_stops_all_ranks(capsys) -> None:
    def work(world: World) -> None:
        raise_if_any_failed(world, capture_error(int, "x" if world.rank else "1"), "not saved")

    (problem,) = problems_on_all(3, work)
    reason = "ValueError: invalid literal for int() with base 10: 'x'"
    assert problem.what == f"not saved: rank 1: {reason}; rank 2: {reason}"
    assert problem.advice == "See the log of that rank"
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_in_reading_stays_with_its_rank() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        on_all_ranks(ALONE, int, "x")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EDQUOT, "Make room"),
        (errno.EACCES, "Give this user permission"),
        (errno.EROFS, "Give this user permission"),
        (errno.ENOENT, "Check that this path exists"),
        (errno.EIO, "Check that folder and its file system"),
    ],
)
def test_the_advice_fits_the_error(number: int, remedy: str) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    (problem,) = problems_on_all(2, lambda w: raise_if_any_failed(w, capture_error(fail), "x"))
    assert problem.advice.startswith(remedy)
    assert f"rank 1: {os.strerror(number)} (/some/file)" in problem.what


def test_only_a_full_disk_gets_advice_about_space(tmp_path: Path, monkeypatch) -> None:
    """A save without enough space has advice about it; one that lacks a tokenizer folder, or
    another path, has only the advice of that problem."""

    def advice_of(fail: Callable[..., None]) -> str:
        monkeypatch.setattr(Commit, "_write", lambda self, *more: fail())
        store, state = Store(tmp_path, "CKP", 0, 0), {"global_step": 1}
        with pytest.raises(UserError) as caught:
            store.save(SaveName("CKP", 0, 1, 1), {}, state, mesh=Mesh(), world=ALONE)
        assert caught.value.problems[0].what.startswith("the checkpoint could not be saved: ")
        return caught.value.problems[0].advice

    def no_tokenizer() -> None:
        raise UserError("no tokenizer", advice="Give pretrained_model_dir")

    assert advice_of(lambda: room_for(tmp_path, 1 << 60)) == (
        "Earlier checkpoints are untouched. Make room, then resume with resume_training: True"
    )
    assert advice_of(no_tokenizer) == "Give pretrained_model_dir"
    assert "room" not in advice_of(lambda: (tmp_path / "tokenizer").rmdir())
