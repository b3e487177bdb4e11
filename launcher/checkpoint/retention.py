"""Retention: which saves of a run are kept, and how many that will be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launcher.checkpoint.catalog import Published


def superseded(saves: Sequence[Published], keep_max: int, keep_minutes: int) -> list[Published]:
    """The saves to remove, of saves in order; never the newest.

    `keep_max`: how many stay. With 0, one stays for each `keep_minutes`; with both 0, all stay.
    """
    if keep_max:
        return list(saves[:-keep_max])
    if not keep_minutes:
        return []
    old, kept_at = [], -math.inf
    for save in saves[:-1]:
        if not save.saved_at:
            continue  # saved by an older version, at an unknown time
        # A time before that of the last kept one: the clock was set back, so start again from it.
        if 0 <= save.saved_at - kept_at < 60 * keep_minutes:
            old.append(save)
        else:
            kept_at = save.saved_at
    return old


def kept_saves(
    *,
    steps: int | None,
    seconds: int = 0,
    limit: int,
    done: int,
    last: int,
    with_best: bool = False,
) -> int | None:
    """How many saves a run from step `done` to step `last` keeps, with one every `steps` steps or
    `seconds` and one of the last step; None where it depends on the time of the run. `limit` 0:
    all. `with_best`: the best one is kept beside the newest."""
    limit += limit > 0 and with_best
    if not steps:
        return (limit or None) if seconds else 1
    saves = max(math.ceil(last / steps) - done // steps, 1)
    return min(saves, limit) if limit else saves
