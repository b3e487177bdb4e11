"""Cost: the disk space and the time that the saves of a run take, with warnings.

Both are estimates: a run whose saves may not fit starts all the same, since retention or the user
may free space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.catalog import published
from launcher.checkpoint.space import free_bytes, size_text
from launcher.checkpoint.store import Store
from launcher.parallel.filesystems import NOT_OPENED
from launcher.parallel.world import World

TIME_SHARE = 0.1
"""Fraction of the time of a run that saves may take without a warning."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the saves of a run will take on one file system."""

    save_bytes: int
    """Of one save, by all ranks that share the file system."""
    kept: int | None
    """Saves that are kept; None: unlimited, or not known."""
    present: int
    """Saves of this run that exist already."""
    free_bytes: int | None
    root: Path

    def __str__(self) -> str:
        each = f"{self.root}: each save takes {size_text(self.save_bytes)}"
        free = "" if self.free_bytes is None else f"{size_text(self.free_bytes)} are free"
        if self.kept is None:
            return f"{each}, all are kept{f', {free}' if free else ''}"
        together = f"{self.kept} kept: {size_text(self.kept * self.save_bytes)}"
        return f"{each}, {together}{f' together, {free}' if free else ''}"

    @property
    def warning(self) -> str:
        """Why the saves may not fit; empty where they take less than half of the free space."""
        if self.free_bytes is None:
            return ""
        more = max((self.kept or 1) - self.present, 1) * self.save_bytes
        if 2 * more <= self.free_bytes:
            return ""
        return (
            f"saves will need {size_text(more)} of the {size_text(self.free_bytes)} free in "
            f"{self.root}: set a smaller keep_checkpoint_max, or another directory"
        )


def forecast(store: Store, sizes: Sequence[int], kept: int | None, world: World) -> list[Forecast]:
    """What the saves of a run take on each file system. `sizes`: bytes of a save by rank; `kept`:
    how many are kept. Called by all ranks together; raises `UserError` on all."""
    free = store.filesystems.on_each(world, NOT_OPENED, free_bytes, store.root)
    present = sum(store.is_own(found.name) for found in published(store.root))
    groups = store.filesystems.groups or (range(world.size),)
    return [
        Forecast(save_bytes=sum(sizes[rank] for rank in ranks), kept=kept, present=present,
                 free_bytes=there, root=store.root)
        for ranks, there in zip(groups, free, strict=True)
    ]  # fmt: skip


def saves_of_earlier_runs(store: Store) -> str:
    """The saves of the folder that retention does not count; empty without any."""
    names = [found.name for found in published(store.root)]
    others = [name.label for name in names if not store.is_own(name)]
    if not others:
        return ""
    return (
        f"{store.root}: {len(others)} save(s) of earlier runs ({', '.join(dict.fromkeys(others))}) "
        f"are kept and do not count for keep_checkpoint_max; this run saves as {store.label}"
    )


class SaveOverhead:
    """The fraction of time that saves take, from the first one on."""

    def __init__(self) -> None:
        self._saves = 0
        self._first_step, self._first_end = 0, 0.0
        self._saving_seconds = 0.0

    def add(self, step: int, started: float, ended: float) -> str:
        """Count a save that blocked training from `started` to `ended`. Returns a warning, once,
        when saves take more than `TIME_SHARE` of the time."""
        self._saves += 1
        if self._saves == 1:  # not counted: it creates folders, and warms up
            self._first_step, self._first_end = step, ended
            return ""
        self._saving_seconds += ended - started
        elapsed, measured = ended - self._first_end, self._saves - 1
        share = self._saving_seconds / elapsed
        if measured != 2 or share <= TIME_SHARE:
            return ""
        save_seconds = self._saving_seconds / measured
        step_seconds = (elapsed - self._saving_seconds) / max(step - self._first_step, 1)
        steps = math.ceil(save_seconds * (1 / TIME_SHARE - 1) / max(step_seconds, 1e-6))
        return (
            f"training waits {share:.0%} of the time for saves, {save_seconds:.2f} s each: set "
            f"save_checkpoint_steps to {steps} or more, or async_save: True"
        )
