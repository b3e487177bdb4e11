"""CheckpointMonitor: when a run saves.

    step ... step | snapshot | step ... step ... step        async_save: training waits for the
                        └── write, publish, retain ──┘       snapshot, and for the previous save;
                                                             on a GPU the snapshot is copied beside
                                                             the next step, up to its update

Owns the order of saves. Invariants: all ranks save the same steps; one save is written at a time;
the last one of a run is waited for; a save that fails leaves earlier ones unchanged. `contents` has
what is saved, `saver` how, `run_folders` where.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from launcher.checkpoint import health
from launcher.checkpoint.background import Background
from launcher.checkpoint.contents import Contents, constant_between_updates
from launcher.checkpoint.cost import SaveOverhead, forecast
from launcher.checkpoint.integrated import FULL
from launcher.checkpoint.names import SaveName, epoch_and_step_in_name
from launcher.checkpoint.retention import kept_saves
from launcher.checkpoint.run_folders import open_saver
from launcher.checkpoint.savable import Savable, Step
from launcher.checkpoint.save_log import no_effect_lines, result_lines
from launcher.checkpoint.saver import Saver, SaveRequest, SaveResult
from launcher.checkpoint.snapshot import Snapshot, SnapshotCopy
from launcher.checkpoint.space import bytes_on_host
from launcher.config.schema import CheckpointMonitorSection
from launcher.errors import UserError
from launcher.parallel.all_ranks import capture_error
from launcher.parallel.world import World
from launcher.report.ranges import SAVE, named_range
from launcher.streams import streams_for

LAST_STEP_ONLY = CheckpointMonitorSection(save_checkpoint_steps=0)
"""For a run without CheckpointMonitor: only the last step is saved."""

LAST_WAIT_SECONDS = 300.0
"""How long a run that fails waits for the save that is being written."""


class CheckpointMonitor:
    """Saves every `save_checkpoint_steps` steps or `save_checkpoint_seconds`, at the end and on a
    signal. With `async_save` in the background."""

    def __init__(self, config: CheckpointMonitorSection) -> None:
        self.config = config
        self._contents = Contents(config)
        self._saved_step = 0
        """Of the newest published save."""
        self._tried_step = 0
        """Of the newest save that was started."""
        self._saved_at = 0.0
        self._embedding_norm: float | None = None
        """Of the newest step that changed weights, where the health of saves is monitored."""
        self._saver: Saver | None = None
        self._snapshot: Snapshot | None = None
        """With `async_save`."""
        self._background: Background[SaveResult] = Background()
        self._save_world: World | None = None
        self._overhead = SaveOverhead()

    @property
    def is_writing(self) -> bool:
        """Whether a save is being written in the background."""
        return self._background.is_busy and not self._background.is_done

    def on_train_begin(self, run: Savable) -> None:
        """Open the folders under a name that no earlier run has, and remove unfinished saves."""
        self._saved_step = self._tried_step = run.global_step
        self._saved_at = time.monotonic()
        self._embedding_norm = None
        self._saver = open_saver(self.config, run, self._contents)
        if run.origin.resumed_from is not None:
            self._catch_up(run, self._saver.complete)
        self._publish_best(run, self._saver)
        if self.config.async_save:
            self._save_world = run.world.with_new_group()
            self._prepare_snapshot(run, self._saver)
        for line in no_effect_lines(self.config):
            run.log(line)
        self._log_space_needed(run)

    def _prepare_snapshot(self, run: Savable, saver: Saver) -> None:
        """Pin its memory beside the first steps. Called by all ranks together."""
        if self._snapshot is None:
            self._snapshot = Snapshot(streams_for(run.world.device))
        nbytes = self._contents.snapshot_nbytes(run, saver.stores)
        line = self._snapshot.prepare(nbytes, bytes_on_host(run.world, nbytes))
        if line:
            run.log(line)

    def _publish_best(self, run: Savable, saver: Saver) -> None:
        """Name the best of the saves that are there: a crash may have come before."""
        try:
            for store in saver.stores.values():
                store.publish_best(run.world)
        except UserError as error:
            run.log(f"warning: {error}")

    def finish_interrupted_save(self, run: Savable) -> None:
        """Finish the last save of a resumed run that has no steps left."""
        if run.origin.resumed_from is not None:  # else its checkpoints are in another folder
            saver = open_saver(self.config, run, self._contents)
            self._catch_up(run, saver.finish_interrupted_save)

    def _catch_up(self, run: Savable, finish: Callable[[SaveName, World], None]) -> None:
        assert run.origin.resumed_from is not None
        try:
            finish(run.origin.resumed_from, run.world)
        except UserError as error:
            run.log(f"warning: {error}")

    def _log_space_needed(self, run: Savable) -> None:
        """Log the size of a save, how many are kept, and the free space."""
        stores = self._open_saver.stores
        if self.config is LAST_STEP_ONLY:
            run.log(
                f"there is no CheckpointMonitor: the last step is saved to {stores[FULL].root} "
                "(final_checkpoint: False saves nothing)"
            )
        sizes = run.world.gather(self._contents.nbytes(run, stores))
        kept = kept_saves(
            steps=self.config.save_checkpoint_steps, seconds=self.config.save_checkpoint_seconds,
            limit=self.config.keep_checkpoint_max or 0,
            done=run.global_step, last=run.total_steps, with_best=self.config.keep_best,
        )  # fmt: skip
        forecasts = forecast(stores[FULL], sizes, kept, run.world)
        run.log(str(forecasts[0]))
        for warning in dict.fromkeys(found.warning for found in forecasts if found.warning):
            run.log(f"warning: {warning}")

    def on_steps_end(self, run: Savable, records: Sequence[Step]) -> None:
        """Log the result of a save in the background, and start another when it is due."""
        for record in records:
            if not record.changed_nothing:
                self._embedding_norm = record.embedding_norm
        self._poll(run)
        if self._is_due(run):
            with named_range(SAVE):
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
        """Wait for a save in the background; with `exception_save`, save the last complete step.

        After a `UserError` nothing is saved: its message has the advice. With several ranks
        nothing is saved either, since the others are in the middle of a step.
        """
        try:
            if self._background.is_busy:
                # After a UserError all ranks are here, and the run may be rolled back.
                timeout = None if isinstance(error, UserError) else LAST_WAIT_SECONDS
                self._log_result(run, self._background.finish(timeout))
            if self.config.exception_save and not isinstance(error, UserError):
                self._save_after_error(run)
        except Exception as another:  # the error that ended the run is the one that is raised
            run.log(f"warning: not saved: {str(another) or type(another).__name__}")

    def _save_after_error(self, run: Savable) -> None:
        """Save the last complete step of a run that failed."""
        if self._saver is None or self._saved_step == run.global_step:
            return
        if run.world.size > 1:
            newest = f"the newest save is that of step {self._saved_step}"
            run.log("exception_save: one rank failed and the others cannot save without it; "
                    f"{newest if self._saved_step else 'nothing is saved yet'}")  # fmt: skip
        elif not run.is_consistent:
            run.log("exception_save: an update of the weights was interrupted, nothing is saved")
        else:
            self._save_last(run)

    def _save_last(self, run: Savable) -> None:
        """Save the current step if it is not saved, and wait. Raises `UserError` on failure."""
        self._wait(run)
        if self._saved_step == run.global_step:
            return
        with named_range(SAVE):
            result = self._open_saver.write(self._request(run), run.world)
        self._log_result(run, result)
        if result.error is not None:
            raise result.error

    def _save(self, run: Savable) -> None:
        started = time.perf_counter()
        self._wait(run)
        self._tried_step, self._saved_at = run.global_step, time.monotonic()
        if self._save_world is None:
            self._finish_save(run, self._open_saver.write(self._request(run), run.world))
        else:
            request, taken = self._copied(run, self._request(run))
            request = replace(request, waited_seconds=time.perf_counter() - started)
            self._background.start(partial(self._write, request, taken, self._save_world))
        warning = self._overhead.add(run.global_step, started, time.perf_counter())
        if warning:
            run.log(f"warning: {warning}")

    def _request(self, run: Savable) -> SaveRequest:
        """A save of the run's current state."""
        contents = self._contents.shards(run, self._open_saver.stores)
        record = run.state_record()
        if self._embedding_norm is not None:
            limit = self.config.embedding_local_norm_threshold
            record[health.KEY] = health.health_verdict(self._embedding_norm, limit)
        epoch, step = epoch_and_step_in_name(run.global_step, run.steps_per_epoch, run.sink_size)
        return SaveRequest(run.global_step, epoch, step, contents, record, 0.0)

    def _copied(self, run: Savable, request: SaveRequest) -> tuple[SaveRequest, SnapshotCopy]:
        """`request` for a copy of the state, and that copy, which may still be on its way."""
        assert self._snapshot is not None
        held = {
            name: shard for folder in request.contents.values() for name, shard in folder.items()
        }
        taken = self._snapshot.take(held, held.keys() - constant_between_updates(run))
        run.add_pending_read(taken.before_update)
        contents = {
            folder: {name: taken.shards[name] for name in names}
            for folder, names in request.contents.items()
        }
        return replace(request, contents=contents, record=copy.deepcopy(request.record)), taken

    def _write(self, request: SaveRequest, taken: SnapshotCopy, world: World) -> SaveResult:
        """Write a copy of the state, once it is there. Runs in the background."""
        taken.finish()
        return self._open_saver.write(request, world)

    @property
    def _open_saver(self) -> Saver:
        if self._saver is None:
            raise RuntimeError("training has not begun")
        return self._saver

    def _poll(self, run: Savable) -> None:
        """Log a save that has ended. Raises `UserError` with `on_save_error: stop`, on all ranks
        after the same step."""
        if not self._background.is_busy:
            return
        is_done = self._background.is_done
        if self.config.on_save_error == "stop":
            is_done = all(run.world.gather(is_done))
        if is_done:
            self._finish_save(run, self._background.finish())

    def _wait(self, run: Savable) -> None:
        """Wait for the save in the background."""
        if self._background.is_busy:
            self._finish_save(run, self._background.finish())

    def _finish_save(self, run: Savable, result: SaveResult) -> None:
        self._log_result(run, result)
        if result.error is not None and self.config.on_save_error == "stop":
            raise result.error

    def _log_result(self, run: Savable, result: SaveResult) -> None:
        for line in result_lines(result, self.config, run.world.size):
            run.log(line)
        if result.error is not None:
            return
        self._saved_step = result.request.step
        verdict = result.request.record.get(health.KEY)
        if verdict is not None and run.world.is_main:
            done = capture_error(health.record_verdict, run.output_dir, result.name, verdict)
            if done.error:
                run.log(f"warning: {health.RECORD} was not written: {done.error}")
