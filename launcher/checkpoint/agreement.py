"""Agreement: a rank that fails still meets the others, and all go on alike.

Owns the pair `agree(world, attempt(action, ...))` for what is written, and `found_by_all` for what
is read. Whatever goes wrong in an action on one rank is an error on all of them; a rank that left
the common path would let the others wait for it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

from launcher.errors import UserError
from launcher.parallel.world import World

RANKS_SHOWN = 4

Seen = TypeVar("Seen")


def attempt(action: Any, *arguments: Any) -> tuple[Any, str]:
    """(result, error text) of an action of this rank."""
    try:
        return action(*arguments), ""
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return None, f"{error.strerror or error}{place}"
    except UserError as error:
        return None, error.problems[0].what
    except Exception as error:  # a fault of ours: the others must not wait, and it must be seen
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"


def agree(
    world: World, outcome: tuple[Any, str], what: str = "the checkpoint could not be saved"
) -> list[Any]:
    """The results of all ranks, or a `UserError` on all, which says `what`, when one failed."""
    outcomes = world.gather(outcome)
    failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if failed:
        raise UserError(
            f"{what}: {'; '.join(failed[:RANKS_SHOWN])}",
            rule="every rank's file must be written",
            advice="Earlier checkpoints are untouched. Make room or mend the folder, then resume "
            "with resume_training: True",
        )
    return [result for result, _ in outcomes]


def found_by_all(world: World, look: Callable[[], Seen]) -> Seen:
    """What `look` finds on this rank. The `UserError` of the first rank that cannot see is raised
    on all of them. Called by all ranks together."""
    seen, problems = None, None
    try:
        seen = look()
    except UserError as error:
        problems = error.problems
    for told in world.gather(problems):
        if told:
            raise UserError(told)
    return cast(Seen, seen)
