"""The dispatcher: one short function a run mode, each the story of that mode.

Called on every rank, after the configuration has been checked; the first place that imports torch.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from launcher.builders.data import evaluation_source
from launcher.builders.job import Job
from launcher.builders.load_weights import find_weights, load_or_init
from launcher.builders.model import build_parallel, build_predicting
from launcher.builders.prediction import PREDICT_BATCH, continue_prompts, result_path
from launcher.builders.resume import find_resume, own_root, resumed_run
from launcher.builders.roll_back import RollBack, no_effect_reason
from launcher.builders.run import fresh_run
from launcher.checkpoint.catalog import published
from launcher.checkpoint.files import json_bytes, write_json
from launcher.checkpoint.in_use import in_use
from launcher.checkpoint.monitor import LAST_STEP_ONLY, CheckpointMonitor
from launcher.config.provenance import Provenance
from launcher.config.schema import Config, OnRequestExitSection, RegisteredCallbackSection
from launcher.config.shared import shared_settings
from launcher.environment import process_environment
from launcher.errors import EXIT_OK, UserError
from launcher.extensions import STRATEGY_WRITERS, installed, required
from launcher.parallel import world as worlds
from launcher.parallel.consistency import check_same
from launcher.parallel.parts import Parts
from launcher.parallel.world import World
from launcher.predict import check_writable, read_prompts, result_text, write_results
from launcher.report.aside import make_way, move_aside, write_new
from launcher.report.console import Console, close_logs, open_logs
from launcher.report.curves import FILE_NAME as CURVE_NAME
from launcher.report.metrics import MetricsLog, Start
from launcher.report.trackers import open_trackers
from launcher.train.callbacks import (
    Callback,
    Evaluation,
    LossMonitor,
    RequestFile,
    build_registered,
    load_registered,
)
from launcher.train.evaluate import evaluate
from launcher.train.health import FiniteCheck, LimitCheck, UnsoundStep, limits_of
from launcher.train.interrupts import Interrupted
from launcher.train.loop import fit
from launcher.train.reporting import Reporting
from launcher.train.run import TrainRun

TRAINING = ("train", "finetune")
"""Modes that write into the folder of a run as one run at a time must."""


def run(
    config: Config, provenance: Provenance, resolved: str, *, ends_with_peers: bool = False
) -> int:
    """Run the mode of `config` in this process. Returns the exit code.

    `resolved`: the configuration as YAML, for `resolved.yaml`. `ends_with_peers`: this process may
    be ended as soon as another rank has failed. Raises `UserError`.
    """
    if config.only_save_strategy:
        mode, world = "strategy", world_without_group()
    else:
        mode = config.run_mode or "train"
        on_cpu = config.context.device_target == "CPU"
        world = worlds.start(force_cpu=on_cpu, ends_with_peers=ends_with_peers)
        check_same(
            world, shared_settings(config), rule="all processes of a job have one configuration",
            advice="Start every machine with the same YAML file and the same overrides",
        )  # fmt: skip
    open_output(config, world)
    job = Job(config, provenance, world, Console(enabled=world.is_main))
    finished = False
    try:
        with in_use(written_folders(job), world) if mode in TRAINING else nullcontext():
            write_resolved(job, resolved_name(mode), resolved)
            code = MODES[mode](job)
        finished = True
    except Interrupted as interrupted:
        job.log(f"stopped by {interrupted}")
        code = interrupted.exit_code
        finished = True
    finally:
        close_logs()
        # A rank that fails alone must not wait for the others to leave the group with it.
        if finished or world.size == 1:
            worlds.stop()
    return code


def world_without_group() -> World:
    """This process by its environment alone, on the CPU: nobody is waited for."""
    environment = process_environment()
    return World(environment.rank, environment.world_size, torch.device("cpu"))


def open_output(config: Config, world: World) -> None:
    """The folder of the run and its logs."""
    try:
        open_logs(Path(config.output_dir), world.rank)
    except OSError as error:
        raise _not_written(config, error) from error


def write_resolved(job: Job, name: str, text: str) -> None:
    """The configuration that runs, as YAML."""
    if not job.world.is_main:
        return
    try:
        write_new(job.output_dir / name, text)
    except OSError as error:
        raise _not_written(job.config, error) from error


def _not_written(config: Config, error: OSError) -> UserError:
    return UserError(
        f"output_dir = {config.output_dir!r}: {error.filename} cannot be written",
        rule=str(error.strerror),
        advice="Set output_dir to a folder this run may write to",
    )


def written_folders(job: Job) -> list[Path]:
    """Where a training run writes: its output, and its saves where they go elsewhere."""
    return list(dict.fromkeys([job.output_dir, own_root(job.config).parent]))


def resolved_name(mode: str) -> str:
    """`resolved.yaml` is the configuration that trained; other modes do not write over it."""
    return "resolved.yaml" if mode in TRAINING else f"resolved_{mode}.yaml"


def train(job: Job) -> int:
    """Go on from a checkpoint, or start from weights, or from nothing."""
    callbacks = build_callbacks(job)
    resume = find_resume(job)
    run = resumed_run(job, resume) if resume else fresh_run(job, find_weights(job))
    return train_to_the_end(job, run, callbacks)


def finetune(job: Job) -> int:
    """Start from weights alone: fresh optimizer, fresh schedule, data from its beginning.

    With resume_training the run goes on from a checkpoint of its own once there is one.
    """
    callbacks = build_callbacks(job)
    resume = find_resume(job)
    weights = None if resume else find_weights(job)
    if resume is None and weights is None:
        raise UserError(
            "finetune has no weights to start from",
            rule="it requires weights",
            advice="Set load_checkpoint or pretrained_model_dir",
        )
    run = resumed_run(job, resume) if resume else fresh_run(job, weights)
    return train_to_the_end(job, run, callbacks)


def evaluate_only(job: Job) -> int:
    """The loss and perplexity of weights on the evaluation data."""
    weights = find_weights(job)
    batches = evaluation_source(job)
    built = build_parallel(job, training=False)
    load_or_init(job, built.parts, built.layout, weights)
    result = evaluate(built.parts, built.compute, built.batch_sharder, batches(), job.world)
    job.log(str(result))
    if job.world.is_main:
        path, row = job.output_dir / "eval_result.json", result.as_row()
        make_way(path, json_bytes(row))
        write_json(path, row)
    return EXIT_OK


def predict(job: Job) -> int:
    """Continue prompts, print them, and write them down."""
    prompts = read_prompts(job.config.input_data)
    check_same(
        job.world, {"--predict_data": prompts}, rule="all ranks continue the same prompts",
        advice="Copy the file of prompts to every machine",
    )  # fmt: skip
    check_writable(result_path(job))
    model, layout = build_predicting(job)
    load_or_init(job, Parts([model]), layout, find_weights(job))
    batch_size = job.config.predict_batch_size or min(len(prompts), PREDICT_BATCH)
    generations = continue_prompts(job, model, prompts, batch_size)
    if job.world.is_main:
        path = write_results(generations, result_path(job), batch_size)
        job.log(result_text(generations, batch_size))
        job.log(f"written: {path.with_suffix('.txt')} and {path}")
    return EXIT_OK


def save_strategy(job: Job) -> int:
    """The strategy files alone (only_save_strategy)."""
    required(STRATEGY_WRITERS, "all", "only_save_strategy: True")(job)
    return EXIT_OK


MODES = {
    "train": train,
    "finetune": finetune,
    "eval": evaluate_only,
    "predict": predict,
    "predict_with_train_model": predict,
    "strategy": save_strategy,
}


def train_to_the_end(job: Job, run: TrainRun, callbacks: list[Callback]) -> int:
    """The loop with its callbacks; metrics and the loss curve are finished whatever happens."""
    if run.state.global_step >= run.total_steps:
        job.log(
            f"nothing to do: step {run.state.global_step} is done, the run has {run.total_steps}"
        )
        for callback in callbacks:
            if isinstance(callback, CheckpointMonitor):
                callback.finish_interrupted_save(run)
        return EXIT_OK
    if write := installed(STRATEGY_WRITERS).get("own"):
        write(job, run.layout, run.mappings_of, run.optimizer.state_names)
    job.log(
        f"training: steps {run.state.global_step + 1} to {run.total_steps}, "
        f"{run.steps_per_epoch} an epoch, {run.loader.global_batch} samples a step, "
        f"{job.world.size} {'rank' if job.world.size == 1 else 'ranks'} on {job.world.device.type}"
    )
    reporting = open_reporting(job, run)
    try:
        fit_with_roll_back(job, run, [*([reporting] if reporting else []), *callbacks])
    finally:
        run.loader.close()
        if reporting:
            reporting.close(run)
    return EXIT_OK


def fit_with_roll_back(job: Job, run: TrainRun, callbacks: list[Callback]) -> None:
    """Train; with `monitor_config.roll_back` steps that are not sound are gone back on."""
    monitor = job.config.monitor_config
    if not monitor.roll_back:
        fit(run, callbacks, run.sink_size)
        return
    if reason := no_effect_reason(job.config):
        job.log(f"monitor_config.roll_back: True has no effect: {reason}")
    way_back = RollBack(job, run, monitor.global_norm_spike_count_threshold)
    while True:
        try:
            fit(run, callbacks, run.sink_size)
        except UnsoundStep as error:
            way_back.take(run, error)
        else:
            return


def open_reporting(job: Job, run: TrainRun) -> Reporting | None:
    """Metrics, progress and trackers: on the main process only."""
    if not job.world.is_main:
        return None
    config = job.config
    board = config.tensorboard.tensorboard_dir
    names = list(dict.fromkeys([*config.trackers, *(["tensorboard"] if board else [])]))
    metadata = {"seed": config.seed, "global_batch_size": run.loader.global_batch,
             "total_steps": run.total_steps, "model": job.spec.hf_config}  # fmt: skip
    trackers = open_trackers(
        names, Path(board or job.output_dir / "trackers"), metadata,
        cpu=job.world.device.type == "cpu",
    )  # fmt: skip
    metrics = MetricsLog(job.output_dir, start_of(job, run), run.state.consumed_samples)
    if metrics.moved_to:
        curve = job.output_dir / CURVE_NAME
        moved = [metrics.moved_to, *([move_aside(curve)] if curve.exists() else [])]
        job.log(f"of an earlier run, moved aside: {', '.join(map(str, moved))}")
    reporting = Reporting(job.console, metrics, trackers)
    run.report_row = reporting.row
    return reporting


def start_of(job: Job, run: TrainRun) -> Start:
    """What the run is to the metrics in its folder, which are those of the run that saved last."""
    if run.resumed_from is not None:
        return Start.SAME
    saved = published(own_root(job.config)) if run.came_from else []
    is_of_last = bool(saved) and run.came_from.startswith(f"{saved[-1].name.label}-")
    return Start.BRANCH if is_of_last else Start.FRESH


def build_callbacks(job: Job) -> list[Callback]:
    """In the original's order: loss, checkpoints, the user's own, evaluation last."""
    config = job.config
    callbacks: list[Callback] = [LossMonitor(config.loss_monitor.per_print_times)]
    callbacks.append(FiniteCheck(stop=config.check_for_nan_in_loss_and_grad))
    limits = limits_of(config)
    if limits is not None:
        most = config.monitor_config.global_norm_spike_count_threshold
        callbacks.append(LimitCheck(limits, most))
    if config.checkpoint_monitor is not None:
        callbacks.append(CheckpointMonitor(config.checkpoint_monitor))  # type: ignore[arg-type]
    elif config.final_checkpoint:
        callbacks.append(CheckpointMonitor(LAST_STEP_ONLY))  # type: ignore[arg-type]
    else:
        job.log("warning: nothing will be saved: there is no CheckpointMonitor, and "
                "final_checkpoint is False")  # fmt: skip
    request = config.last_callback(OnRequestExitSection)
    if request is not None and request.config_file:
        callbacks.append(RequestFile(request.config_file))
    registered = load_registered(config.register_path) if config.register_path else {}
    for index, entry in enumerate(config.callbacks):
        if isinstance(entry, RegisteredCallbackSection):
            where = job.provenance.nearest(f"callbacks.{index}.type")
            callbacks.append(build_registered(entry, registered, where))
    if config.do_eval:
        interval, epochs = config.eval_step_interval, config.eval_epoch_interval
        callbacks.append(Evaluation(interval, epochs))
    return callbacks
