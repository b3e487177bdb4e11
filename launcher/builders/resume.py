"""Resuming a run: which checkpoint, everything it brings back, and the receipt of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.builders.balanced_load import load_job
from launcher.builders.export_on_load import export_on_load
from launcher.builders.gradients import watches_health
from launcher.builders.job import Job
from launcher.builders.load_weights import (
    check_cuts,
    check_layout,
    check_same_model,
    sync_tied_weights,
)
from launcher.builders.resume_report import InferredState, ResumeDetails, resume_report
from launcher.builders.run import build_run
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.resume import Chosen, choose
from launcher.config.schema import Config
from launcher.errors import UserError
from launcher.extensions import INFERRED_STATES, required
from launcher.train.run import TrainRun
from launcher.train.state import TrainState, from_json
from launcher.weights.optimizer_state import STATE_PREFIXES
from models.build import tied_names


def find_resume(job: Job) -> Chosen | None:
    """The checkpoint to go on from; None, with a warning, when there is none yet."""
    choice = job.config.resume_training
    if choice is False:
        return None
    root = resume_root(job.config)
    strategy = job.config.src_strategy_path_or_dir
    healthy = watches_health(job.config)
    chosen = choose(root, choice, job.world, job.log, strategy, healthy=healthy)
    if chosen is None:
        job.log(f"warning: resume_training is on, but {root} holds no checkpoint: a fresh start")
    return chosen


DATA_KEYS = {
    "seq_length": "train_dataset.seq_length",
    "packing": "train_dataset.packing",
    "order_seed": "seed",
    "shuffle": "train_dataset.data_loader.shuffle",
}
"""Facts about the data to the keys that set them; what is not here follows from the files."""


def resume_root(config: Config) -> Path:
    """The folder of checkpoints a resume looks into."""
    if config.load_checkpoint:
        return Path(config.load_checkpoint)
    return own_root(config)


def own_root(config: Config) -> Path:
    """The folder of checkpoints this run writes to."""
    monitor = config.checkpoint_monitor
    return Path((monitor and monitor.directory) or config.output_dir) / "checkpoint"


def resumed_run(job: Job, chosen: Chosen) -> TrainRun:
    """A run that goes on: weights, optimizer, schedule, data position, random numbers."""
    check_same_model(job)
    run = build_run(job)
    derived = None if chosen.state else _inferred(run, chosen)
    saved = derived.saved if derived is not None else chosen.state
    state = restore(job, run, chosen, saved, copies=True)
    run.state = _data_position(job, run, saved, state)
    run.resumed_from = name_to_keep(job, run, chosen)
    if own_root(job.config).resolve() == chosen.root.resolve():
        run.came_from = chosen.label
    if run.resumed_from is None:
        run.inputs |= {file.resolve() for file in chosen.files}
    for line in resume_report(_resume_details(job, run, chosen, saved, derived)):
        job.log(line)
    for key in ("seed", "optimizer", "schedule", "loss_scaling"):
        if saved.get(key) != run.metadata[key]:
            job.log(f"warning: {key} was {saved.get(key)}, is {run.metadata[key]} from here on")
    return run


def _inferred(run: TrainRun, chosen: Chosen) -> InferredState:
    """The state of a run whose save has no state file."""
    infer = required(INFERRED_STATES, "mindformers", f"{chosen.label} has no state file")
    inferred: InferredState = infer(run, chosen)
    return inferred


def restore(
    job: Job, run: TrainRun, chosen: Chosen, saved: Mapping[str, Any], *, copies: bool = False
) -> TrainState:
    """Give `run` the weights and the optimizer of a checkpoint; with `copies` also write those that
    the configuration asks for. Returns the state `saved` with them, in steps of this run's global
    batch."""
    state = _with_loss_scale(run, saved, from_json(dict(saved), str(chosen.state_path)))
    _restore_tensors(job, run, chosen, copies=copies)
    if not _has_same_steps(run, saved):
        state = state.with_global_batch(run.loader.global_batch)
    run.optimizer.set_updates(state.updates)
    return state


def _has_same_steps(run: TrainRun, saved: Mapping[str, Any]) -> bool:
    return bool(saved.get("global_batch_size") == run.loader.global_batch)


def name_to_keep(job: Job, run: TrainRun, chosen: Chosen) -> SaveName | None:
    """The name under which `run` goes on saving; None: a new one. That of the checkpoint only where
    no name can come twice: steps counted anew would repeat some."""
    whole_sinks = run.sink_size == 1 or run.state.global_step % run.sink_size == 0
    own = own_root(job.config).resolve() == chosen.root.resolve()
    same = own and chosen.is_newest and _has_same_steps(run, chosen.state) and whole_sinks
    return chosen.name if same else None


def _resume_details(
    job: Job, run: TrainRun, chosen: Chosen, saved: Mapping[str, Any], derived: InferredState | None
) -> ResumeDetails:
    source = chosen.source
    return ResumeDetails(
        name=chosen.label,
        folder=str(chosen.root),
        saved=saved,
        # Complete weights have no layout that could be another one.
        saved_ranks=source.world_size if source.kind == "distributed" else job.world.size,
        saved_mesh=source.mesh or {},
        state=run.state,
        metadata=run.metadata,
        mesh=job.mesh,
        total_steps=run.total_steps,
        data_position_is_set=_names_place_in_data(job.config),
        derived=derived,
    )


def _names_place_in_data(config: Config) -> bool:
    return config.ignore_data_skip or config.data_skip_steps is not None


def _with_loss_scale(run: TrainRun, saved: Mapping[str, Any], state: TrainState) -> TrainState:
    """A dynamic loss scale goes on where it was; any other is what the configuration says."""
    kind = run.metadata["loss_scaling"]
    if kind == "dynamic" == saved.get("loss_scaling"):
        return state
    return replace(state, loss_scale=run.state.loss_scale, good_steps=0)


def _restore_tensors(job: Job, run: TrainRun, chosen: Chosen, *, copies: bool) -> None:
    check_layout(job, chosen.source)
    _check_optimizer_state(job, run, chosen)
    run.optimizer.allocate_state(run.parts.named_parameters())
    targets = {**run.weights(), **run.optimizer_state()}
    check_cuts(job, chosen.source, targets)
    if copies:
        export_on_load(job, chosen.source)
    load_job(
        job, targets, run.layout, run.mappings_of, chosen.source,
        tied=tied_names(run.parts.modules[-1]),
        ignore_prefixes=STATE_PREFIXES,  # what an optimizer does not use may be there
        expected=run.shapes_in_files(optimizer=True),
    )  # fmt: skip
    sync_tied_weights(run.parts)
    run.optimizer.copy_state(run.parts.copies())


def _check_optimizer_state(job: Job, run: TrainRun, chosen: Chosen) -> None:
    """Check that the checkpoint holds what the optimizer of this run keeps. Raises `UserError`."""
    needed = {prefix + name for name, prefixes in run.state_names().items() for prefix in prefixes}
    missing = sorted(needed - chosen.source.tensors.keys())
    if not missing:
        return
    now, before = job.config.optimizer.type, chosen.state.get("optimizer")
    if not any(name.startswith(STATE_PREFIXES) for name in chosen.source.tensors):
        reason = "; it was saved with save_optimizer: False, or by an optimizer that keeps none"
        raise UserError(
            f"{chosen.files[0].name} holds weights without optimizer state",
            where=str(chosen.root),
            rule="a resumed run needs both" + (reason if chosen.state else ""),
            advice="Use run_mode finetune to start from its weights",
        )
    if before not in (None, now):
        raise UserError(
            f"{chosen.label} was saved with optimizer.type {before}: it has no `{missing[0]}`",
            where=job.provenance.nearest("optimizer.type"),
            rule=f"a run resumed with {now} needs the state of {now}",
            nearest=f"Nearest: optimizer.type: {before}",
            advice="Use run_mode finetune to start from its weights with another optimizer",
        )


def _data_position(
    job: Job, run: TrainRun, saved: Mapping[str, Any], state: TrainState
) -> TrainState:
    """Where the data goes on; refuses to go on in other data, or in another order, unasked."""
    if _names_place_in_data(job.config):
        skipped = (job.config.data_skip_steps or 0) * run.loader.global_batch
        return replace(state, data_position=skipped)
    before, present = saved.get("data", {}), run.metadata["data"]
    changed = [key for key in present if before.get(key) != present[key]]
    if changed:
        settings = [key for key in changed if key in DATA_KEYS]
        listing = ", ".join(f"{DATA_KEYS[k]}: {before.get(k)} -> {present[k]}" for k in settings)
        key = DATA_KEYS[settings[0]] if settings else "train_dataset.data_loader.dataset_dir"
        raise UserError(
            "the training data is not that of the checkpoint "
            f"({listing or 'the content of the files differs'})",
            where=job.provenance.nearest(key),
            rule="a resumed run goes on in the same samples in the same order",
            advice="Give the same data, or say where to begin in the new one: "
            "ignore_data_skip: True (at its start) or data_skip_steps: n",
        )
    return state
