"""Resuming a run: which checkpoint, what is restored from it, and the resume report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launcher.builders.adapter import check_same_adapter, record_adapter, saved_base
from launcher.builders.balanced_load import load_job
from launcher.builders.export_on_load import export_on_load
from launcher.builders.gradients import watches_health
from launcher.builders.job import Job
from launcher.builders.load_weights import (
    check_cuts,
    check_layout,
    check_same_model,
    load_or_init,
    resumed_base,
    sync_tied_weights,
    under_model_names,
)
from launcher.builders.mixture_resume import MIXTURE, continued
from launcher.builders.reference import restore_reference
from launcher.builders.resume_report import InferredState, ResumeDetails, resume_report
from launcher.builders.run import build_run
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.resume import Chosen, choose
from launcher.checkpoint.savable import Origin
from launcher.config.schema import Config
from launcher.data.mixture import MixtureOrder
from launcher.errors import UserError
from launcher.extensions import INFERRED_STATES, required
from launcher.layout.shard import Shard
from launcher.report.run_record import INITIAL_WEIGHTS
from launcher.train.run import BuiltModel, TrainRun
from launcher.train.state import DATA_CURSOR, TrainState, from_json
from launcher.weights.joined import apart
from launcher.weights.optimizer_state import STATE_PREFIXES
from launcher.weights.reading.tensor_bytes import TORCH_DTYPES
from models.build import tied_names


def find_resume(job: Job) -> Chosen | None:
    """The checkpoint to resume from; None, with a warning, when there is none yet."""
    choice = job.config.resume_training
    if choice is False:
        return None
    root = resume_root(job.config)
    strategy = job.config.src_strategy_path_or_dir
    healthy = watches_health(job.config)
    chosen = choose(root, choice, job.world, job.log, strategy, healthy=healthy)
    if chosen is not None and not chosen.state:
        return replace(chosen, source=under_model_names(job, chosen.source))
    if chosen is None:
        job.log(f"warning: resume_training is on, but {root} has no checkpoint: starting at step 1")
    return chosen


DATA_KEYS = {
    "seq_length": "train_dataset.seq_length",
    "packing": "train_dataset.packing",
    "packing_strategy": "train_dataset.packing_strategy",
    "order_seed": "seed",
    "shuffle": "train_dataset.data_loader.shuffle",
    "streaming": "train_dataset.data_loader.streaming",
    "shuffle_buffer": "train_dataset.data_loader.shuffle_buffer",
}
"""Metadata of the data to the keys that set it; the rest follows from the files."""


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
    """A run with the weights, optimizer state, step and data position of a checkpoint."""
    check_same_model(job)
    base = saved_base(job, chosen.state, chosen.label)
    weights = None if base is None else resumed_base(job, base)
    run = build_run(job)
    derived = None if chosen.state else _inferred(run, chosen)
    saved = derived.saved if derived is not None else chosen.state
    restore_reference(job, run, saved)
    if weights is not None:
        record_adapter(run, job, weights.base)
        check_same_adapter(job, run, saved, chosen.label)
        load_or_init(job, run.model.parts, run.model.layout, weights)
        run.origin = replace(run.origin, inputs=run.origin.inputs | weights.inputs)
    state = restore(job, run, chosen, saved, export=True)
    run.state, mixture = _data_position(job, run, saved, state)
    if saved.get("data") == run.metadata["data"]:
        run.loader.seek(saved.get(DATA_CURSOR))
    run.metadata[INITIAL_WEIGHTS] = saved.get(INITIAL_WEIGHTS)
    run.origin = _origin(job, run, chosen)
    for line in resume_report(_resume_details(job, run, chosen, saved, derived, mixture)):
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


def _origin(job: Job, run: TrainRun, chosen: Chosen) -> Origin:
    is_own = own_root(job.config).resolve() == chosen.root.resolve()
    name = name_to_keep(job, run, chosen)
    files = set() if name is not None else {file.resolve() for file in chosen.files}
    return Origin(
        inputs=run.origin.inputs | files,
        came_from=chosen.label if is_own else "",
        resumed_from=name,
    )


def restore(
    job: Job, run: TrainRun, chosen: Chosen, saved: Mapping[str, Any], *, export: bool = False
) -> TrainState:
    """Load the weights and the optimizer state of a checkpoint, maybe of an earlier version with
    other names, into `run`; with `export` also write
    the copies that the configuration requests. Returns the state `saved` with them, in steps of
    this run's global batch."""
    state = _with_loss_scale(run, saved, from_json(dict(saved), str(chosen.state_path)))
    named = replace(chosen, source=apart(chosen.source, job.spec.hf_config))
    _restore_tensors(job, run, named, export=export)
    if not _has_same_steps(run, saved):
        state = state.with_global_batch(run.loader.global_batch)
    run.optimizer.set_updates(state.updates)
    return state


def _has_same_steps(run: TrainRun, saved: Mapping[str, Any]) -> bool:
    return bool(saved.get("global_batch_size") == run.loader.global_batch)


def name_to_keep(job: Job, run: TrainRun, chosen: Chosen) -> SaveName | None:
    """The name whose counter `run` keeps in its saves; None: a new counter. That of the checkpoint
    is kept only where no name can repeat: steps of another batch size would repeat some."""
    full_sinks = run.sink_size == 1 or run.state.global_step % run.sink_size == 0
    own = own_root(job.config).resolve() == chosen.root.resolve()
    same = own and chosen.is_newest and _has_same_steps(run, chosen.state) and full_sinks
    return chosen.name if same else None


def _resume_details(
    job: Job,
    run: TrainRun,
    chosen: Chosen,
    saved: Mapping[str, Any],
    derived: InferredState | None,
    mixture: Sequence[str],
) -> ResumeDetails:
    source = chosen.source
    return ResumeDetails(
        name=chosen.label,
        folder=str(chosen.root),
        saved=saved,
        # Complete weights have no layout to differ.
        saved_ranks=source.world_size if source.kind == "distributed" else job.world.size,
        saved_mesh=source.mesh or {},
        state=run.state,
        metadata=run.metadata,
        mesh=job.mesh,
        total_steps=run.total_steps,
        data_position_is_set=_sets_data_position(job.config),
        derived=derived,
        mixture=tuple(mixture),
    )


def _sets_data_position(config: Config) -> bool:
    return config.ignore_data_skip or config.data_skip_steps is not None


def _with_loss_scale(run: TrainRun, saved: Mapping[str, Any], state: TrainState) -> TrainState:
    """A dynamic loss scale is restored; any other follows from the configuration."""
    kind = run.metadata["loss_scaling"]
    if kind == "dynamic" == saved.get("loss_scaling"):
        return state
    return replace(state, loss_scale=run.state.loss_scale, good_steps=0)


def _restore_tensors(job: Job, run: TrainRun, chosen: Chosen, *, export: bool) -> None:
    check_layout(job, chosen.source)
    _check_optimizer_state(job, run, chosen)
    model = run.model
    run.wait_for_reads()
    run.optimizer.allocate_state(model.parts.named_parameters())
    targets = {**run.weights(), **run.optimizer_state()}
    _log_converted_state(job, chosen, run.optimizer_state())
    check_cuts(job, chosen.source, targets)
    if export:
        export_on_load(job, chosen.source)
    load_job(
        job, targets, model.layout, model.mappings_of, chosen.source,
        tied=_tied(run, model),
        ignore_prefixes=STATE_PREFIXES,  # what an optimizer does not use may be there
        expected=run.shapes_in_files(optimizer=True),
    )  # fmt: skip
    sync_tied_weights(model.parts)
    run.optimizer.copy_state(model.parts.replicas())


def _log_converted_state(job: Job, chosen: Chosen, state: Mapping[str, Shard]) -> None:
    """Log that moments change their dtype as they are loaded."""
    tensors = chosen.source.tensors
    pairs = {
        (TORCH_DTYPES[chosen.source.dtype(name)], shard.tensor.dtype)
        for name, shard in state.items()
        if name in tensors and chosen.source.dtype(name) in TORCH_DTYPES
    }
    for before, now in sorted(pairs, key=str):
        if before != now:
            job.log(f"optimizer state: {_word(before)} in {chosen.label}, {_word(now)} in this run")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tied(run: TrainRun, model: BuiltModel) -> dict[str, str]:
    """Names of tied weights, where they are saved."""
    saved = run.shapes_in_files(optimizer=False)
    names = tied_names(model.parts.modules[-1])
    return {alias: name for alias, name in names.items() if name in saved}


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
) -> tuple[TrainState, list[str]]:
    """The state with its data position, and what has changed in the shares of a mixture. Raises
    `UserError` where data or order have changed and the configuration does not set a position."""
    if _sets_data_position(job.config):
        skipped = (job.config.data_skip_steps or 0) * run.loader.global_batch
        return replace(state, data_position=skipped), []
    before, present = saved.get("data", {}), run.metadata["data"]
    keys = dict.fromkeys([*present, *before])
    changed = [key for key in keys if key != MIXTURE and before.get(key) != present.get(key)]
    if (MIXTURE in before) != (MIXTURE in present):
        forms = ("a mixture" if MIXTURE in data else "one source" for data in (before, present))
        raise _other_data(
            job, "train_dataset.data_loader: {} -> {}".format(*forms), "train_dataset.data_loader"
        )
    if changed:
        settings = [key for key in changed if key in DATA_KEYS]
        listing = ", ".join(
            f"{DATA_KEYS[k]}: {before.get(k)} -> {present.get(k)}" for k in settings
        )
        raise _other_data(job, listing, DATA_KEYS[settings[0]] if settings else "")
    order = run.loader.order
    if not isinstance(order, MixtureOrder):
        return state, []
    order, entry, changes = continued(order, before[MIXTURE], state.data_position, job.provenance)
    run.loader.follow(order)
    run.metadata["data"] = {**present, MIXTURE: entry}
    return state, changes


def _other_data(job: Job, listing: str, key: str) -> UserError:
    return UserError(
        "the training data is not that of the checkpoint "
        f"({listing or 'the content of the files differs'})",
        where=job.provenance.nearest(key or "train_dataset.data_loader.dataset_dir"),
        rule="a resumed run continues with the same samples in the same order",
        advice="Use the same data, or set the position in the new data: "
        "ignore_data_skip: True (its start) or data_skip_steps: n",
    )
