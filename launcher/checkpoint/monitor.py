"""CheckpointMonitor: when a run saves, and what.

    step ... step | snapshot | step ... step ... step        async_save: training waits for the
                        └── write, publish, retain ──┘       snapshot, and for the save before it

Owns the order of saves. Invariants: all ranks save the same steps; one save is under way at a time;
the last one of a run is waited for; a save that fails leaves the earlier ones as they were.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoint import health
from launcher.checkpoint.background import Background
from launcher.checkpoint.cleanup import clean_filesystems, next_counter
from launcher.checkpoint.cost import (
    Pace,
    forecast,
    kept_of_earlier_runs,
    kept_saves,
    nbytes_of,
)
from launcher.checkpoint.integrated import FULL
from launcher.checkpoint.names import SaveName, epoch_and_step_in_name
from launcher.checkpoint.savable import Savable, Step
from launcher.checkpoint.saver import NETWORK, TRAINABLE, Saver, SaveRequest, SaveResult
from launcher.checkpoint.snapshot import Snapshot
from launcher.checkpoint.store import Store
from launcher.config.schema import CheckpointMonitorSection
from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard
from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.filesystems import NOT_OPENED, FilesystemGroups, find_filesystem_groups
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import inventory_of
from launcher.weights.offline.merge import MODEL_FOLDER
from launcher.weights.ranks.redundancy import writers_of

LAST_STEP_ONLY = CheckpointMonitorSection(save_checkpoint_steps=0)
"""For a run without CheckpointMonitor: the last step is saved, and nothing before it."""

LAST_WAIT_SECONDS = 300.0
"""How long a run that fails waits for the save that is under way."""


class CheckpointMonitor:
    """Saves every `save_checkpoint_steps` steps, or every so many seconds, at the end and on a
    signal.

    `checkpoint/` gets weights and optimizer (weights alone with `save_optimizer: False`);
    `checkpoint_network/` weights alone, with `save_network_params: True`; `checkpoint_trainable/`
    those that are trained, with `save_trainable_params: True`; `checkpoint_integrated/` complete
    weights, with `integrated_save: True`.
    """

    def __init__(self, config: CheckpointMonitorSection) -> None:
        self.config = config
        self._saved_step = 0
        """Of the newest save that is published."""
        self._tried_step = 0
        """Of the newest save that was begun."""
        self._saved_at = 0.0
        self._embedding_norm: float | None = None
        """Of the newest step that changed anything, where the health of saves is watched."""
        self._saver: Saver | None = None
        self._kept: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        """Folder to the tensors that were shared out, and those of them that are this rank's."""
        self._snapshot = Snapshot()
        self._background: Background[SaveResult] = Background()
        self._save_world: World | None = None
        self._pace = Pace()

    @property
    def is_writing(self) -> bool:
        """Whether a save is being written beside training at this moment."""
        return self._background.is_busy and not self._background.is_done

    def on_train_begin(self, run: Savable) -> None:
        """Take a name that no earlier run has, and clear away what a crash left."""
        self._saved_step = self._tried_step = run.global_step
        self._saved_at = time.monotonic()
        self._embedding_norm = None
        self._saver = self._open(run)
        if run.resumed_from is not None:
            self._catch_up(run, self._saver.complete)
        if self.config.async_save:
            self._save_world = run.world.with_new_group()
        self._warn_no_effect(run)
        self._log_space_needed(run)

    def finish_interrupted_save(self, run: Savable) -> None:
        """End what this run was killed in, which has nothing else to do any more."""
        if run.resumed_from is not None:  # else its checkpoints are in another folder
            self._catch_up(run, self._open(run).finish_interrupted_save)

    def _catch_up(self, run: Savable, action: Callable[[SaveName, World], None]) -> None:
        assert run.resumed_from is not None
        try:
            action(run.resumed_from, run.world)
        except UserError as error:
            run.log(f"warning: {error}")

    def _open(self, run: Savable) -> Saver:
        root = Path(self.config.directory) if self.config.directory else run.output_dir
        stores = {}
        for folder in self._folders():
            filesystems = find_filesystem_groups(root / folder, run.world)
            self._refuse_to_merge(filesystems, root / folder)
            counter = self._open_folder(run, root / folder, filesystems)
            made = capture_error(_make_folder, root / folder / f"rank_{run.world.rank}")
            raise_if_any_failed(run.world, made, NOT_OPENED)
            stores[folder] = Store(
                root / folder,
                self.config.prefix,
                counter,
                self.config.keep_checkpoint_max or 0,
                run.inputs,
                inventory_of(self._shapes(run, folder)),
                self.config.keep_checkpoint_per_n_minutes,
                filesystems,
                run.came_from.rpartition("-")[0] if folder == FULL else "",
            )
            if run.world.is_main and (line := kept_of_earlier_runs(stores[folder])):
                run.log(line)
        return Saver(
            stores, run.mesh, remove_redundancy=self.config.remove_redundancy,
            integrate=self.config.integrated_save,
        )  # fmt: skip

    def _warn_no_effect(self, run: Savable) -> None:
        """The original's rule: a limit in time acts where that in numbers is off."""
        config = self.config
        for key, value, other, number in (
            ("save_checkpoint_seconds", config.save_checkpoint_seconds,
             "save_checkpoint_steps", config.save_checkpoint_steps),
            ("keep_checkpoint_per_n_minutes", config.keep_checkpoint_per_n_minutes,
             "keep_checkpoint_max", config.keep_checkpoint_max),
        ):  # fmt: skip
            if value and number:
                run.log(f"{key}: {value} has no effect: {other} is {number}. Set that to 0")

    def _log_space_needed(self, run: Savable) -> None:
        """Bytes of a save, how many stay, and what is free: before the first step."""
        store = self._open_saver.stores[FULL]
        if self.config is LAST_STEP_ONLY:
            run.log(
                f"there is no CheckpointMonitor: the last step is saved to {store.root} "
                "(final_checkpoint: False saves nothing)"
            )
        sizes = run.world.gather(self._bytes_of_a_save(run))
        kept = kept_saves(
            steps=self.config.save_checkpoint_steps, seconds=self.config.save_checkpoint_seconds,
            limit=self.config.keep_checkpoint_max or 0,
            done=run.global_step, last=run.total_steps,
        )  # fmt: skip
        forecasts = forecast(store, sizes, kept, run.world)
        run.log(str(forecasts[0]))
        for warning in dict.fromkeys(found.warning for found in forecasts if found.warning):
            run.log(f"warning: {warning}")

    def _bytes_of_a_save(self, run: Savable) -> int:
        """Of this rank, in all folders. Each state of a weight is as large as the weight."""
        total, optimizer = 0, self.config.save_optimizer
        weights, states = run.weights(), run.state_names()
        for folder in self._folders():
            if self.config.remove_redundancy:
                held = self._without_copies(run, folder, weights)
            else:
                held = weights
            trained = {name: shard for name, shard in held.items() if name in states}
            total += nbytes_of(trained if folder == TRAINABLE else held)
            if folder == FULL and optimizer:
                total += sum(len(states[n]) * nbytes_of({n: s}) for n, s in trained.items())
        if self.config.integrated_save and run.world.is_main:
            numbers = sum(map(math.prod, run.shapes_in_files(optimizer=False).values()))
            total += numbers * next(iter(weights.values())).tensor.element_size()
        return total

    def _folders(self) -> list[str]:
        wanted = {FULL: True, NETWORK: self.config.save_network_params,
                  TRAINABLE: self.config.save_trainable_params}  # fmt: skip
        return [folder for folder, is_wanted in wanted.items() if is_wanted]

    def _shapes(self, run: Savable, folder: str) -> Mapping[str, Shape]:
        shapes = run.shapes_in_files(optimizer=folder == FULL and self.config.save_optimizer)
        return {n: shapes[n] for n in run.state_names()} if folder == TRAINABLE else shapes

    def _refuse_to_merge(self, filesystems: FilesystemGroups, folder: Path) -> None:
        if self.config.integrated_save and filesystems.are_several:
            raise UserError(
                f"integrated_save: True: rank {filesystems.groups[1][0]} and rank 0 do not share "
                "a file system: rank 0 cannot read what it writes "
                f"to {folder}",
                rule="one rank puts the complete weights together, from the files of all",
                nearest="Nearest: launcher.tools.unified_safetensors, once all rank folders lie "
                "together",
                advice="Set integrated_save: False, or give a folder that all machines share",
            )

    def _open_folder(self, run: Savable, folder: Path, filesystems: FilesystemGroups) -> int:
        """Clear it, on each disk. Returns the counter of this run, which no run there has."""
        removed = clean_filesystems(folder, filesystems, run.world, run.inputs)
        if removed:
            run.log(f"{folder}: removed {removed} files of a save that was never finished")
        goes_on, prefix = run.resumed_from, self.config.prefix
        if goes_on is not None and goes_on.prefix == prefix:
            counter = goes_on.counter
        else:
            counter = max(filesystems.on_each(run.world, NOT_OPENED, next_counter, folder, prefix))
        model_folder = folder / MODEL_FOLDER / SaveName(prefix, counter, 1, 1).label
        filesystems.on_each(run.world, NOT_OPENED, run.write_model_files, model_folder)
        return counter

    def on_steps_end(self, run: Savable, records: Sequence[Step]) -> None:
        """Say what became of a save under way, and begin another when it is due."""
        for record in records:
            if not record.changed_nothing:
                self._embedding_norm = record.embedding_norm
        self._look(run)
        if self._is_due(run):
            self._save(run)

    def _is_due(self, run: Savable) -> bool:
        interval = self.config.save_checkpoint_steps
        if interval:
            return run.global_step // interval > self._tried_step // interval
        seconds = self.config.save_checkpoint_seconds
        if not seconds:
            return False
        is_late: bool = run.world.from_main(time.monotonic() - self._saved_at >= seconds)
        return is_late

    def on_interrupt(self, run: Savable) -> None:
        """Save before the run stops."""
        self._save_last(run)

    def on_train_end(self, run: Savable) -> None:
        """Save the last step."""
        self._save_last(run)

    def on_exception(self, run: Savable, error: Exception) -> None:
        """Let a save under way come to its end; with `exception_save`, save the last whole step.

        A run that ends with a message for the user (`UserError`) saves nothing: the message says
        what to go on from. Ranks that did not fail are in the middle of a step, so that with
        several ranks there is no save.
        """
        try:
            if self._background.is_busy:
                # After a message for the user all ranks are here, and the run may go back.
                patience = None if isinstance(error, UserError) else LAST_WAIT_SECONDS
                self._report(run, self._background.finish(patience))
            if self.config.exception_save and not isinstance(error, UserError):
                self._save_after(run)
        except Exception as trouble:  # the error that ended the run comes first
            run.log(f"warning: not saved: {str(trouble) or type(trouble).__name__}")

    def _save_after(self, run: Savable) -> None:
        """Save the last whole step of a run that failed."""
        if self._saver is None or self._saved_step == run.global_step:
            return
        if run.world.size > 1:
            newest = f"the newest save is that of step {self._saved_step}"
            run.log("exception_save: one rank failed and the others cannot save without it; "
                    f"{newest if self._saved_step else 'nothing is saved yet'}")  # fmt: skip
        elif not run.is_consistent:
            run.log("exception_save: an update of the weights was cut short, nothing is saved")
        else:
            self._save_last(run)

    def _save_last(self, run: Savable) -> None:
        """Save what is not saved, and wait for it. Raises `UserError` when it cannot be."""
        self._wait(run)
        if self._saved_step == run.global_step:
            return
        done = self._open_saver.write(self._request(run), run.world)
        self._report(run, done)
        if done.error is not None:
            raise done.error

    def _save(self, run: Savable) -> None:
        started = time.perf_counter()
        self._wait(run)
        self._tried_step, self._saved_at = run.global_step, time.monotonic()
        if self._save_world is None:
            self._finish_save(run, self._open_saver.write(self._request(run), run.world))
        else:
            job = self._request(run, started)
            self._background.start(partial(self._open_saver.write, job, self._save_world))
        warning = self._pace.add(run.global_step, started, time.perf_counter())
        if warning:
            run.log(f"warning: {warning}")

    def _request(self, run: Savable, asynchronous_since: float | None = None) -> SaveRequest:
        """What is to be saved of the run as it is now; a copy of it for an asynchronous save."""
        contents = self._contents(run)
        record, waited = run.state_record(), 0.0
        if self._embedding_norm is not None:
            limit = self.config.embedding_local_norm_threshold
            record[health.KEY] = health.health_verdict(self._embedding_norm, limit)
        if asynchronous_since is not None:
            together = {name: shard for held in contents.values() for name, shard in held.items()}
            taken = self._snapshot.take(together)
            contents = {folder: {n: taken[n] for n in held} for folder, held in contents.items()}
            record = copy.deepcopy(record)
            waited = time.perf_counter() - asynchronous_since
        epoch, step = epoch_and_step_in_name(run.global_step, run.steps_per_epoch, run.sink_size)
        return SaveRequest(run.global_step, epoch, step, contents, record, waited)

    def _contents(self, run: Savable) -> dict[str, dict[str, Shard]]:
        weights = run.weights()
        optimizer = run.optimizer_state() if self.config.save_optimizer else {}
        contents = {FULL: {**weights, **optimizer}, NETWORK: weights}
        folders = self._folders()
        if TRAINABLE in folders:
            trained = run.state_names()
            contents[TRAINABLE] = {n: shard for n, shard in weights.items() if n in trained}
        contents = {folder: contents[folder] for folder in folders}
        if self.config.remove_redundancy:
            contents = {f: self._without_copies(run, f, held) for f, held in contents.items()}
        return contents

    @property
    def _open_saver(self) -> Saver:
        if self._saver is None:
            raise RuntimeError("training has not begun")
        return self._saver

    def _look(self, run: Savable) -> None:
        """Say what became of a save that has ended. Raises `UserError` with `on_save_error: stop`,
        on all ranks after the same step."""
        if not self._background.is_busy:
            return
        is_done = self._background.is_done
        if self.config.on_save_error == "stop":
            is_done = all(run.world.gather(is_done))
        if is_done:
            self._finish_save(run, self._background.finish())

    def _wait(self, run: Savable) -> None:
        """Wait for the save under way."""
        if self._background.is_busy:
            self._finish_save(run, self._background.finish())

    def _finish_save(self, run: Savable, done: SaveResult) -> None:
        self._report(run, done)
        if done.error is not None and self.config.on_save_error == "stop":
            raise done.error

    def _report(self, run: Savable, done: SaveResult) -> None:
        job, name = done.job, done.name
        for trouble in done.troubles:
            run.log(f"warning: {name} is saved, but {trouble}")
        for old in done.removed:
            run.log(f"removed {old}, of the run that this one goes on from: {self._retention()}")
        if done.error is not None:
            where = f" in {done.failed_in}, only in {', '.join(done.saved_in)}"
            run.log(f"warning: step {job.step} was not saved{where if done.saved_in else ''}: "
                    f"{done.error}")  # fmt: skip
            return
        self._saved_step = job.step
        if health.KEY in job.record:
            self._log_health(run, name, job.record[health.KEY])
        ranks = "1 rank" if run.world.size == 1 else f"{run.world.size} ranks"
        beside = f" beside training, which waited {job.waited_seconds:.2f} s"
        run.log(
            f"saved step {job.step} as {name}: {ranks}, {done.nbytes / 1e6:.1f} MB, "
            f"{done.seconds:.2f} s{beside if job.waited_seconds else ''}"
        )

    def _log_health(self, run: Savable, name: SaveName, found: dict[str, Any]) -> None:
        if not found["is_healthy"]:
            run.log(f"warning: {name}: {health.health_issue({health.KEY: found})}")
        if run.world.is_main:
            error = capture_error(health.write_down, run.output_dir, name, found).error
            if error:
                run.log(f"warning: {health.RECORD} was not written: {error}")

    def _retention(self) -> str:
        if self.config.keep_checkpoint_max:
            return f"keep_checkpoint_max is {self.config.keep_checkpoint_max}"
        return f"keep_checkpoint_per_n_minutes is {self.config.keep_checkpoint_per_n_minutes}"

    def _without_copies(
        self, run: Savable, folder: str, held: Mapping[str, Shard]
    ) -> dict[str, Shard]:
        """What is left to this rank: shared out once, and anew should there be other tensors."""
        shared_out, kept = self._kept.get(folder, (frozenset(), frozenset()))
        if shared_out != held.keys():
            keeper = writers_of(held, self._replica_ranks(run, folder))
            kept = frozenset(name for name in held if keeper[name] == run.world.rank)
            self._kept[folder] = frozenset(held), kept
        return {name: held[name] for name in held if name in kept}

    def _replica_ranks(self, run: Savable, folder: str) -> Mapping[str, Ranks]:
        """The ranks that hold the same; on several disks each has all that its ranks hold."""
        peers = set(self._open_saver.stores[folder].filesystems.peers(run.world))
        return {
            name: tuple(rank for rank in ranks if rank in peers)
            for name, ranks in run.replica_ranks().items()
        }


def _make_folder(folder: Path) -> None:
    """Where this rank will write: found out now, not when the first checkpoint is due."""
    folder.mkdir(parents=True, exist_ok=True)
