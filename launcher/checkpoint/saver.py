"""The saver: everything of one save, written into all its folders.

Owns the order of folders, and which of them have a step already: a save that failed in one is tried
again only there. Called by all ranks together, from the thread of training or from another; of the
run it knows only what does not change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.checkpoint.integrated import (
    FULL,
    INTEGRATED_FOLDER,
    folder_of,
    write_integrated,
)
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.published import published
from launcher.checkpoint.store import Store
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.world import World

NETWORK, TRAINABLE = "checkpoint_network", "checkpoint_trainable"
"""Folders of saves beside `FULL`, which has what a resume needs: the weights alone, the trained
weights alone."""
NOT_INTEGRATED = "the complete weights could not be written"


@dataclass(frozen=True)
class SaveRequest:
    """One save: everything it needs, so that it can be done while the run goes on."""

    step: int
    epoch: int
    step_in_epoch: int
    contents: Mapping[str, Mapping[str, Shard]]
    """By folder."""
    record: dict[str, Any]
    """Content of the state file."""
    waited_seconds: float
    """How long training stood still for it."""


@dataclass(frozen=True)
class SaveResult:
    """What became of a save."""

    job: SaveRequest
    name: SaveName
    """In the first folder."""
    seconds: float
    nbytes: int = 0
    removed: tuple[SaveName, ...] = ()
    """Saves that were deleted of the run that this one goes on from."""
    troubles: tuple[str, ...] = ()
    """What went wrong after it was published."""
    error: UserError | None = None
    failed_in: str = ""
    """The folder it could not be saved in."""
    saved_in: tuple[str, ...] = ()
    """The folders that have it."""


class Saver:
    """Writes saves into `stores`, by folder; with `integrate` also complete weights."""

    def __init__(
        self, stores: Mapping[str, Store], mesh: Mesh, *, remove_redundancy: bool, integrate: bool
    ) -> None:
        self.stores = stores
        self._mesh = mesh
        self._remove_redundancy = remove_redundancy
        self._integrate = integrate
        self._written: set[tuple[str, int]] = set()
        """(folder, step) of what this run has written."""

    def write(self, job: SaveRequest, world: World) -> SaveResult:
        """Write and publish everything of a save that is not there yet."""
        started, nbytes = time.perf_counter(), 0
        removed, troubles, folder = list[SaveName](), list[str](), FULL
        world = world.with_long_timeout()
        error = None
        try:
            for folder, store in self.stores.items():
                if (folder, job.step) in self._written:
                    continue
                name = _name(store, job)
                saved = store.save(
                    name, job.contents[folder], job.record, mesh=self._mesh, world=world,
                    remove_redundancy=self._remove_redundancy,
                )  # fmt: skip
                self._written.add((folder, job.step))
                nbytes += saved.bytes_written
                removed += [old for old in saved.removed if old.label != name.label]
                troubles += [saved.trouble] * bool(saved.trouble)
            folder = INTEGRATED_FOLDER
            if self._integrate and (folder, job.step) not in self._written:
                self.integrate(_name(self.stores[FULL], job), world)
                self._written.add((folder, job.step))
        except UserError as found:
            error = found
        return SaveResult(
            job, _name(self.stores[FULL], job), time.perf_counter() - started, nbytes,
            tuple(dict.fromkeys(removed)), tuple(troubles), error, folder if error else "",
            tuple(known for known, step in sorted(self._written) if step == job.step),
        )  # fmt: skip

    def integrate(self, name: SaveName, world: World) -> None:
        """Merge the weights of a published save. Raises `UserError`."""
        store = self.stores[FULL]
        outcome = capture_error(_integrate, store, name) if world.is_main else None
        raise_if_any_failed(world.with_long_timeout(), outcome, NOT_INTEGRATED)

    def finish_interrupted_save(self, newest: SaveName, world: World) -> None:
        """Do what an earlier run did not come to after it published `newest`, its last save.

        Raises `UserError`.
        """
        for store in self.stores.values():
            store.finish_interrupted_save(world)
        self.complete(newest, world)

    def complete(self, newest: SaveName, world: World) -> None:
        """Merge the weights of `newest`, the last save of an earlier run, if it did not come to
        that. Raises `UserError`."""
        root = self.stores[FULL].root
        if self._integrate and not world.from_main(folder_of(root, str(newest)).exists()):
            self.integrate(newest, world)


def _name(store: Store, job: SaveRequest) -> SaveName:
    return SaveName(store.prefix, store.counter, job.epoch, job.step_in_epoch)


def _integrate(store: Store, name: SaveName) -> None:
    checkpoint = next(found for found in published(store.root) if found.name == name)
    write_integrated(checkpoint, store.inputs)
