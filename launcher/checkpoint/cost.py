"""Cost: what the saves of a run take of the disk, told before the first step, and of the time.

Owns both estimates and their warnings. Nothing is decided here: a run whose saves do not fit begins
all the same, since retention or the user may make room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.published import published
from launcher.checkpoint.space import free_bytes, size_text
from launcher.checkpoint.store import Store
from launcher.layout.shard import Shard
from launcher.parallel.filesystems import NOT_OPENED
from launcher.parallel.world import World

TIME_SHARE = 0.1
"""Of the time of a run that saves may take without a warning."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the saves of a run will take on one disk."""

    save_bytes: int
    """Of one save, by all ranks that see the disk."""
    kept: int | None
    """Saves that stay; None: nobody knows, there is no limit."""
    present: int
    """Saves of this run that are there already."""
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
        """Why the saves may not fit; empty where they fit easily."""
        if self.free_bytes is None:
            return ""
        more = max((self.kept or 1) - self.present, 1) * self.save_bytes
        if 2 * more <= self.free_bytes:
            return ""
        return (
            f"saves will need {size_text(more)} of the {size_text(self.free_bytes)} that are free "
            f"in {self.root}: set a smaller keep_checkpoint_max, or another directory"
        )


def forecast(store: Store, sizes: Sequence[int], kept: int | None, world: World) -> list[Forecast]:
    """What the saves of a run take on each disk. `sizes`: bytes of a save, by rank; `kept`: how
    many stay. Called by all ranks together; raises `UserError` on all."""
    free = store.filesystems.on_each(world, NOT_OPENED, free_bytes, store.root)
    present = sum(store.is_own(found.name) for found in published(store.root))
    groups = store.filesystems.groups or (range(world.size),)
    return [
        Forecast(save_bytes=sum(sizes[rank] for rank in ranks), kept=kept, present=present,
                 free_bytes=there, root=store.root)
        for ranks, there in zip(groups, free, strict=True)
    ]  # fmt: skip


def kept_of_earlier_runs(store: Store) -> str:
    """Which saves in the folder retention leaves alone; empty where there are none."""
    names = [found.name for found in published(store.root)]
    others = [name.label for name in names if not store.is_own(name)]
    if not others:
        return ""
    return (
        f"{store.root}: {len(others)} save(s) of earlier runs ({', '.join(dict.fromkeys(others))}) "
        f"are kept and do not count for keep_checkpoint_max; this run saves as {store.label}"
    )


def kept_saves(
    *, steps: int | None, seconds: int = 0, limit: int, done: int, last: int
) -> int | None:
    """How many saves stay of those from step `done` to step `last`, one every `steps` steps or
    `seconds`, and one of the last step; None where only the time a run takes tells. `limit` 0:
    all."""
    if not steps:
        return (limit or None) if seconds else 1
    saves = max(math.ceil(last / steps) - done // steps, 1)
    return min(saves, limit) if limit else saves


class Pace:
    """How much of the time of a run its saves take, from the first one on."""

    def __init__(self) -> None:
        self._saves = 0
        self._first_step, self._first_end = 0, 0.0
        self._saving_seconds = 0.0

    def add(self, step: int, started: float, ended: float) -> str:
        """Count a save, for which training waited from `started` to `ended`. Returns a warning,
        once, when saves take more than `TIME_SHARE` of the time."""
        self._saves += 1
        if self._saves == 1:  # it also makes folders, and warms up
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


def nbytes_of(shards: Mapping[str, Shard]) -> int:
    """Bytes of the tensors of this rank."""
    return sum(shard.tensor.nbytes for shard in shards.values())
