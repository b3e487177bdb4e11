"""Agreement: a rank that fails still meets the others, and all go on alike.

Owns the pair `agree(world, attempt(action, ...))` for what is written, and `found_by_all` for what
is read. Whatever goes wrong in an action on one rank is an error on all of them; a rank that left
the common path would let the others wait for it.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from launcher.errors import Problem, UserError
from launcher.parallel.world import World

RANKS_SHOWN = 4
NOT_SAVED = "the checkpoint could not be saved"
_UNTOUCHED = "Earlier checkpoints are untouched"
_RESUME = "then resume with resume_training: True"

_RULES = {NOT_SAVED: "every rank's file must be written"}

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class RankError:
    """What went wrong in an action of one rank; `str` gives it in one line."""

    text: str = ""
    """Of an error of the system, or of this program."""
    errno: int = 0
    problems: tuple[Problem, ...] = ()
    """Of a `UserError`, which explains itself."""

    def __str__(self) -> str:
        return self.text or "; ".join(problem.what for problem in self.problems)


def capture_error(action: Any, *arguments: Any) -> tuple[Any, RankError | None]:
    """(result, trouble) of an action of this rank."""
    try:
        return action(*arguments), None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return None, RankError(f"{error.strerror or error}{place}", error.errno or 0)
    except UserError as error:
        return None, RankError(problems=error.problems)
    except Exception as error:  # a bug: the other ranks must not wait, and it must be seen
        traceback.print_exc()
        return None, RankError(f"{type(error).__name__}: {error}")


def raise_if_any_failed(
    world: World, outcome: tuple[Any, RankError | None], what: str = NOT_SAVED
) -> list[Any]:
    """The results of all ranks, or a `UserError` on all, which says `what`, when one failed."""
    outcomes = world.gather(outcome)
    failed = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
    if failed:
        raise UserError(_problems(failed, what))
    return [result for result, _ in outcomes]


def _problems(failed: dict[int, RankError], what: str) -> list[Problem]:
    """One problem for the errors of the system, and those that explain themselves."""
    found = []
    plain = {rank: error for rank, error in failed.items() if error.text}
    if plain:
        shown = [f"rank {rank}: {error}" for rank, error in plain.items()]
        found.append(
            Problem(
                what=(f"{what}: " if what else "") + "; ".join(shown[:RANKS_SHOWN]),
                rule=_RULES.get(what, "every rank must be able to do its part"),
                advice=_advice({error.errno for error in plain.values()}, what),
            )
        )
    explained = dict[Problem, list[int]]()
    for rank, error in failed.items():
        for problem in error.problems:
            explained.setdefault(problem, []).append(rank)
    for problem, ranks in explained.items():
        who = f"{what}: rank {', '.join(map(str, ranks[:RANKS_SHOWN]))}: " if what else ""
        found.append(replace(problem, what=who + problem.what))
    return found


def _advice(numbers: set[int], what: str) -> str:
    """How to go on after errors of the system."""
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        remedy = "Make room"
    elif numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        remedy = "Give this user permission to write there, or choose another folder"
    elif numbers == {0}:
        return "See the log of that rank"
    else:
        remedy = "Check that folder and its file system"
    return f"{_UNTOUCHED}. {remedy}, {_RESUME}" if what == NOT_SAVED else remedy


def on_all_ranks(world: World, look: Callable[[], Seen]) -> Seen:
    """What `look` finds on this rank. The `UserError` of the first rank that has one is raised on
    all of them; it names the rank where not all ranks see the same. Called by all ranks together.
    """
    seen, problems = None, None
    try:
        seen = look()
    except UserError as error:
        problems = error.problems
    reported = world.gather(problems)
    first = next((found for found in reported if found), None)
    if first is None:
        return cast(Seen, seen)
    if all(found == first for found in reported):
        raise UserError(first)
    rank = reported.index(first)
    raise UserError([replace(problem, what=f"rank {rank}: {problem.what}") for problem in first])
