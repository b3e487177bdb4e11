"""The saver: one save, written into all its folders.

Owns the order of folders, and which of them have a step already: after an error in one, only the
missing ones are written again. Called by all ranks together, from the thread of training or from
another.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.checkpoint.catalog import published
from launcher.checkpoint.integrated import FULL, INTEGRATED_FOLDER, folder_of, write_integrated
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.store import Saved, Store
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.world import World

NOT_INTEGRATED = "the complete weights could not be written"


@dataclass(frozen=True)
class SaveRequest:
    """One save: everything it needs, so that it can be written while the run continues."""

    step: int
    epoch: int
    step_in_epoch: int
    contents: Mapping[str, Mapping[str, Shard]]
    """By folder."""
    record: dict[str, Any]
    """Content of the state file."""
    waited_seconds: float
    """How long training waited for it."""


@dataclass(kw_only=True)
class SaveResult:
    """The result of a save."""

    request: SaveRequest
    name: SaveName
    """In the first folder."""
    seconds: float = 0.0
    nbytes: int = 0
    is_best: bool = False
    """Whether `keep_best` is on, and it is the best save of the run so far."""
    removed: list[SaveName] = field(default_factory=list)
    """Deleted saves of the run that this one resumes."""
    warnings: list[str] = field(default_factory=list)
    """What failed after it was published."""
    error: UserError | None = None
    failed_in: str = ""
    """The folder where it could not be saved."""
    saved_in: tuple[str, ...] = ()
    """The folders that have it."""

    def add(self, saved: Saved, store: Store) -> None:
        """Add what was saved in one folder."""
        self.nbytes += saved.bytes_written
        others = [name for name in saved.removed if name.label != store.label]
        self.removed += [name for name in others if name not in self.removed]
        self.warnings += [saved.warning] if saved.warning else []
        if store.root.name == FULL:
            self.is_best = saved.best == self.name


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

    def write(self, request: SaveRequest, world: World) -> SaveResult:
        """Write and publish a save in the folders that do not have it yet."""
        started = time.perf_counter()
        world = world.with_long_timeout()
        result = SaveResult(request=request, name=_name(self.stores[FULL], request))
        for folder in (*self.stores, *([INTEGRATED_FOLDER] if self._integrate else [])):
            if (folder, request.step) in self._written:
                continue
            try:
                self._write_folder(folder, request, world, result)
            except UserError as error:
                result.error, result.failed_in = error, folder
                break
            self._written.add((folder, request.step))
        result.seconds = time.perf_counter() - started
        saved = (folder for folder, step in sorted(self._written) if step == request.step)
        result.saved_in = tuple(saved)
        return result

    def _write_folder(
        self, folder: str, request: SaveRequest, world: World, result: SaveResult
    ) -> None:
        if folder == INTEGRATED_FOLDER:
            self.integrate(result.name, world)
            return
        store = self.stores[folder]
        saved = store.save(
            _name(store, request), request.contents[folder], request.record, mesh=self._mesh,
            world=world, remove_redundancy=self._remove_redundancy,
        )  # fmt: skip
        result.add(saved, store)

    def integrate(self, name: SaveName, world: World) -> None:
        """Merge the weights of a published save. Raises `UserError` on every rank."""
        outcome = capture_error(_integrate, self.stores[FULL], name) if world.is_main else None
        raise_if_any_failed(world.with_long_timeout(), outcome, NOT_INTEGRATED)

    def finish_interrupted_save(self, newest: SaveName, world: World) -> None:
        """Do what an earlier run had left to do after it published `newest`, its last save.

        Raises `UserError`.
        """
        for store in self.stores.values():
            store.finish_interrupted_save(world)
        self.complete(newest, world)

    def complete(self, newest: SaveName, world: World) -> None:
        """Merge the weights of `newest`, the last save of an earlier run, if they are missing.

        Raises `UserError`.
        """
        root = self.stores[FULL].root
        if self._integrate and not world.from_main(folder_of(root, str(newest)).exists()):
            self.integrate(newest, world)


def _name(store: Store, request: SaveRequest) -> SaveName:
    return SaveName(
        store.prefix, store.counter, request.epoch, request.step_in_epoch, store.file_format
    )


def _integrate(store: Store, name: SaveName) -> None:
    save = next(save for save in published(store.root) if save.name == name)
    write_integrated(store.root, str(name), save.files, store.inputs)
