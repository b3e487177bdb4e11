"""Agreement: a rank that fails still meets the others, and all go on alike.

Owns the pair `agree(world, attempt(action, ...))`. Whatever goes wrong in an action on one rank is
an error on all of them; a rank that left the common path would let the others wait for it.
"""

from __future__ import annotations

import traceback
from typing import Any

from launcher.errors import UserError
from launcher.parallel.world import World

RANKS_SHOWN = 4


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
