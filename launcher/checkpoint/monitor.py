"""CheckpointMonitor: when a run saves, and what."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from launcher.checkpoint.names import SaveName, epoch_and_step_in_name
from launcher.checkpoint.store import Store, agree, attempt, clean_unfinished, next_counter
from launcher.config.schema import CheckpointMonitorSection
from launcher.layout.box import Shape
from launcher.layout.holders import Ranks
from launcher.layout.mesh import Mesh
from launcher.parallel.world import World
from launcher.weights.formats.note import inventory_of
from launcher.weights.offline.merge import MODEL_FOLDER
from launcher.weights.ranks.redundancy import keepers_of
from launcher.weights.reading.memory import Shard


class Savable(Protocol):
    """What a run shows of itself to be saved (`launcher.train.run.TrainRun` is one)."""

    world: World
    mesh: Mesh
    steps_per_epoch: int
    sink_size: int
    resumed_from: SaveName | None
    inputs: frozenset[Path]

    @property
    def output_dir(self) -> Path: ...
    @property
    def global_step(self) -> int: ...
    def weights(self) -> dict[str, Shard]: ...
    def optimizer_state(self) -> dict[str, Shard]: ...
    def holders(self) -> dict[str, Ranks]: ...
    def shapes_in_files(self, *, optimizer: bool) -> dict[str, Shape]: ...
    def state_record(self) -> dict[str, Any]: ...
    def write_model_files(self, directory: Path) -> None: ...
    def say(self, text: str) -> None: ...


class CheckpointMonitor:
    """Saves every `save_checkpoint_steps` steps, at the end and on a signal.

    `checkpoint/` gets weights and optimizer (weights alone with `save_optimizer: False`),
    `checkpoint_network/` weights alone, with `save_network_params: True`.
    """

    def __init__(self, config: CheckpointMonitorSection) -> None:
        self.config = config
        self._saved_step = 0
        self._stores: dict[str, Store] = {}
        self._kept: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        """Folder to the tensors that were shared out, and those of them that are this rank's."""

    def on_train_begin(self, run: Savable) -> None:
        """Take a name that no earlier run has, and clear away what a crash left."""
        self._saved_step = run.global_step
        root = Path(self.config.directory) if self.config.directory else run.output_dir
        folders = ["checkpoint"] + ["checkpoint_network"] * self.config.save_network_params
        for folder in folders:
            found = attempt(self._open_folder, run, root / folder) if run.world.is_main else (0, "")
            counter = agree(run.world, found)[0]
            agree(run.world, attempt(_make_folder, root / folder / f"rank_{run.world.rank}"))
            self._stores[folder] = Store(
                root / folder,
                self.config.prefix,
                counter,
                self.config.keep_checkpoint_max,
                run.inputs,
                inventory_of(run.shapes_in_files(optimizer=self._has_optimizer(folder))),
            )

    def _has_optimizer(self, folder: str) -> bool:
        return folder == "checkpoint" and self.config.save_optimizer

    def _open_folder(self, run: Savable, folder: Path) -> int:
        removed = clean_unfinished(folder)
        if removed:
            run.say(f"{folder}: removed {len(removed)} files of a save that was never finished")
        goes_on = run.resumed_from
        if goes_on is not None and goes_on.prefix == self.config.prefix:
            counter = goes_on.counter
        else:
            counter = next_counter(folder, self.config.prefix)
        name = SaveName(self.config.prefix, counter, 1, 1)
        run.write_model_files(folder / MODEL_FOLDER / name.label)
        return counter

    def on_steps_end(self, run: Savable, records: Sequence[object]) -> None:
        """Save at every multiple of `save_checkpoint_steps`, also after a save in between."""
        interval = self.config.save_checkpoint_steps
        if interval and run.global_step // interval > self._saved_step // interval:
            self._save(run)

    def on_interrupt(self, run: Savable) -> None:
        """Save before the run stops."""
        self._save(run)

    def on_train_end(self, run: Savable) -> None:
        """Save the last step."""
        self._save(run)

    def _save(self, run: Savable) -> None:
        if self._saved_step == run.global_step:
            return
        started = time.perf_counter()
        weights = run.weights()
        contents = {"checkpoint": weights, "checkpoint_network": weights}
        if self.config.save_optimizer:
            contents["checkpoint"] = {**weights, **run.optimizer_state()}
        if self.config.remove_redundancy:
            contents = {f: self._without_copies(run, f, held) for f, held in contents.items()}
        epoch, step = epoch_and_step_in_name(run.global_step, run.steps_per_epoch, run.sink_size)
        total, names = 0, []
        for folder, store in self._stores.items():
            name = SaveName(store.prefix, store.counter, epoch, step)
            saved = store.save(
                name, contents[folder], run.state_record(), mesh=run.mesh, world=run.world,
                remove_redundancy=self.config.remove_redundancy,
            )  # fmt: skip
            names.append(str(name))
            total += saved.bytes_written
            for old in saved.removed:
                run.say(f"removed {old} of an earlier run: keep_checkpoint_max is {store.keep_max}")
        self._saved_step = run.global_step
        ranks = "1 rank" if run.world.size == 1 else f"{run.world.size} ranks"
        run.say(
            f"saved step {run.global_step} as {names[0]}: {ranks}, {total / 1e6:.1f} MB, "
            f"{time.perf_counter() - started:.2f} s"
        )

    def _without_copies(
        self, run: Savable, folder: str, held: Mapping[str, Shard]
    ) -> dict[str, Shard]:
        """What is left to this rank: shared out once, and anew should there be other tensors."""
        shared_out, kept = self._kept.get(folder, (frozenset(), frozenset()))
        if shared_out != held.keys():
            keeper = keepers_of(held, run.holders())
            kept = frozenset(name for name in held if keeper[name] == run.world.rank)
            self._kept[folder] = frozenset(held), kept
        return {name: held[name] for name in held if name in kept}


def _make_folder(folder: Path) -> None:
    """Where this rank will write: found out now, not when the first checkpoint is due."""
    folder.mkdir(parents=True, exist_ok=True)
