"""One error for all ranks: when one rank fails, every rank raises the same `UserError`.

A rank that raised on its own would leave the others waiting in the next collective. `on_all_ranks`
is for work whose result stays on its rank, which is most reading. Where results travel or only some
ranks work, `capture_error` runs the work and `raise_if_any_failed` exchanges the outcomes.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, ParamSpec, TypeVar, cast

from launcher.errors import Problem, UserError
from launcher.parallel.world import World

RANKS_SHOWN = 4

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RankError:
    """The error of one rank; `str` gives it in one line."""

    text: str = ""
    """Of an `OSError`, or of a bug."""
    errno: int = 0
    problems: tuple[Problem, ...] = ()
    """Of a `UserError`, with rule and advice of their own."""

    def __str__(self) -> str:
        return self.text or "; ".join(problem.what for problem in self.problems)


class Outcome(NamedTuple, Generic[Result]):
    """The result or the error of one rank."""

    result: Result | None = None
    error: RankError | None = None


def capture_error(fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Outcome[Result]:
    """Run `fn` on this rank and return its result or its error; a bug is printed as it happens."""
    try:
        return Outcome(fn(*args, **kwargs))
    except OSError as error:
        path = f" ({error.filename})" if error.filename else ""
        return Outcome(error=RankError(f"{error.strerror or error}{path}", error.errno or 0))
    except UserError as error:
        return Outcome(error=RankError(problems=error.problems))
    except Exception as error:
        traceback.print_exc()
        return Outcome(error=RankError(f"{type(error).__name__}: {error}"))


def raise_if_any_failed(
    world: World,
    outcome: Outcome[Result] | None,
    what: str = "",
    *,
    rule: str = "every rank must be able to do its part",
    advice: str = "{}",
) -> list[Result]:
    """The results of all ranks that did the work, in rank order. Called by all ranks together.

    `outcome` is None on a rank that had no part in it. Raises `UserError` on every rank when one
    failed: `what` names the work, and `{}` in `advice` becomes the remedy for a system error.
    """
    outcomes = dict(enumerate(world.gather(outcome)))
    done = {rank: outcome for rank, outcome in outcomes.items() if outcome is not None}
    failed = {rank: outcome.error for rank, outcome in done.items() if outcome.error is not None}
    if failed:
        prefix = f"{what}: " if what else ""
        raise UserError([
            *_system_problems(failed, prefix, rule, advice),
            *_user_problems(failed, prefix, len(done)),
        ])  # fmt: skip
    return [cast(Result, outcome.result) for outcome in done.values()]


def on_all_ranks(
    world: World, fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
) -> Result:
    """The result of `fn` on this rank; a `UserError` of any rank is raised on every rank.

    Called by all ranks together. Other exceptions stay with their rank and end the job
    (`launcher.parallel.peers`).
    """
    outcome: Outcome[Result] = Outcome()
    try:
        outcome = Outcome(fn(*args, **kwargs))
    except UserError as error:
        outcome = Outcome(error=RankError(problems=error.problems))
    raise_if_any_failed(world, outcome._replace(result=None))  # results stay where they are
    return cast(Result, outcome.result)


def _system_problems(
    failed: Mapping[int, RankError], prefix: str, rule: str, advice: str
) -> list[Problem]:
    """One problem for all system errors and bugs."""
    errors = {rank: error for rank, error in failed.items() if error.text}
    if not errors:
        return []
    shown = [f"rank {rank}: {error}" for rank, error in errors.items()]
    numbers = {error.errno for error in errors.values()}
    how = advice.format(_remedy(numbers)) if numbers != {0} else "See the log of that rank"
    return [Problem(what=prefix + "; ".join(shown[:RANKS_SHOWN]), rule=rule, advice=how)]


def _user_problems(failed: Mapping[int, RankError], prefix: str, ranks: int) -> Iterable[Problem]:
    """The problems of the first rank that has any, with the ranks that share them where not all do.

    Other ranks mostly have the same cause under other names, which would bury the first.
    """
    first = next((error.problems for error in failed.values() if error.problems), ())
    for problem in first:
        found_by = [rank for rank, error in failed.items() if problem in error.problems]
        names = ", ".join(map(str, found_by[:RANKS_SHOWN]))
        who = f"rank {names}: " if len(found_by) < ranks else ""
        yield replace(problem, what=prefix + who + problem.what)


def _remedy(numbers: set[int]) -> str:
    """What to do about system errors with these numbers. Only a full disk calls for space."""
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return "Make room"
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return "Give this user permission there, or choose another folder"
    if numbers & {errno.ENOENT, errno.ENOTDIR}:
        return "Check that this path exists"
    return "Check that folder and its file system"
