"""The run modes: one short function for each.

Called on every rank, after the configuration has been checked; the first module that imports torch.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from launcher.builders.callbacks import build_callbacks
from launcher.builders.data import evaluation_data
from launcher.builders.final_adapter import write_final_adapter
from launcher.builders.interactive import chat
from launcher.builders.job import Job
from launcher.builders.load_weights import find_weights, load_or_init
from launcher.builders.model import build_parallel, build_predicting
from launcher.builders.next_steps import next_steps
from launcher.builders.prediction import (
    check_lengths,
    continue_prompts,
    open_stream,
    prepare_prompts,
    result_path,
    texts_in_batch,
)
from launcher.builders.prepare import prepare_data
from launcher.builders.profiling import open_profiler
from launcher.builders.reference import with_reference
from launcher.builders.reporting import open_reporting
from launcher.builders.resume import find_resume, own_root, resumed_run
from launcher.builders.roll_back import fit_with_roll_back
from launcher.builders.run import fresh_run
from launcher.builders.show_data import show_data
from launcher.builders.start import chosen_kernels, join
from launcher.checkpoint.files import json_bytes, write_json
from launcher.checkpoint.in_use import in_use
from launcher.checkpoint.monitor import CheckpointMonitor
from launcher.config.provenance import Provenance
from launcher.config.schema import Config
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.environment import process_environment
from launcher.errors import EXIT_OK, UserError
from launcher.extensions import STRATEGY_WRITERS, installed, required
from launcher.parallel import world as worlds
from launcher.parallel.consistency import check_same
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.world import World
from launcher.predict.prompts import read_prompts
from launcher.predict.results import check_writable, result_text, write_results
from launcher.report.aside import make_way, write_new
from launcher.report.console import Console, close_logs, open_logs
from launcher.train.callbacks import Callbacks
from launcher.train.evaluate import evaluate_sets
from launcher.train.interrupts import Interrupted
from launcher.train.run import TrainRun

TRAINING = ("train", "finetune")
"""Modes that need `output_dir` for themselves."""


def run(
    config: Config, provenance: Provenance, resolved: str, *, ends_with_peers: bool = False
) -> int:
    """Run the mode of `config` in this process. Returns the exit code.

    `resolved`: the configuration as YAML, for `resolved.yaml`. `ends_with_peers`: whether this
    process ends as soon as another rank has failed. Raises `UserError`.
    """
    if config.only_save_strategy:
        mode, world = "strategy", world_without_group()
    else:
        mode = config.run_mode or "train"
        world = join(config, ends_with_peers=ends_with_peers)
    open_output(config, world)
    job = Job(config, provenance, world, Console(enabled=world.is_main))
    finished = False
    try:
        with in_use(written_folders(job), world) if mode in TRAINING else nullcontext():
            write_resolved(job, resolved_name(mode), resolved)
            with nullcontext() if mode == "strategy" else chosen_kernels(job):
                code = MODES[mode](job)
        finished = True
    except Interrupted as interrupted:
        job.log(f"stopped by {interrupted}")
        code = interrupted.exit_code
        finished = True
    finally:
        close_logs()
        # A rank that fails alone must not wait for the others to leave the process group.
        if finished or world.size == 1:
            worlds.stop(world)
    return code


def prepare(config: Config, provenance: Provenance) -> int:
    """Prepare the data of `config` in this process alone. Returns the exit code."""
    world = World(0, 1, torch.device("cpu"))
    return prepare_data(Job(config, provenance, world, Console(enabled=True)))


def show(config: Config, provenance: Provenance, count: int) -> int:
    """Print samples of the data of `config`. Returns the exit code."""
    world = World(0, 1, torch.device("cpu"))
    return show_data(Job(config, provenance, world, Console(enabled=True)), count)


def world_without_group() -> World:
    """This process by its environment alone, on the CPU: nobody is waited for."""
    environment = process_environment()
    return World(environment.rank, environment.world_size, torch.device("cpu"))


def open_output(config: Config, world: World) -> None:
    """Open the logs in the folder of the run."""
    try:
        open_logs(Path(config.output_dir), world.rank)
    except OSError as error:
        raise _not_written(config, error) from error


def write_resolved(job: Job, name: str, text: str) -> None:
    """Write the resolved configuration, as YAML."""
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
        advice="Set output_dir to a writable folder",
    )


def written_folders(job: Job) -> list[Path]:
    """The folders a training run writes to: output_dir, and that of its checkpoints."""
    return list(dict.fromkeys([job.output_dir, own_root(job.config).parent]))


def resolved_name(mode: str) -> str:
    """`resolved.yaml` is that of training; other modes do not overwrite it."""
    return "resolved.yaml" if mode in TRAINING else f"resolved_{mode}.yaml"


def train(job: Job) -> int:
    """Train: resumed from a checkpoint, or from weights, or from random ones."""
    callbacks = build_callbacks(job)
    with open_profiler(job) as profiler:
        resume = find_resume(job)
        run = resumed_run(job, resume) if resume else fresh_run(job, find_weights(job))
        run.profiler = profiler
        return train_to_the_end(job, run, callbacks)


def finetune(job: Job) -> int:
    """Train from weights, with a new optimizer and schedule, from the start of the data.

    With resume_training the run resumes from its own checkpoint once there is one.
    """
    callbacks = build_callbacks(job)
    with open_profiler(job) as profiler:
        resume = find_resume(job)
        weights = None if resume else find_weights(job)
        if resume is None and weights is None:
            raise UserError(
                "finetune has no weights to start from",
                rule="it requires weights",
                advice="Set load_checkpoint or pretrained_model_dir",
            )
        run = resumed_run(job, resume) if resume else fresh_run(job, weights)
        run.profiler = profiler
        return train_to_the_end(job, run, callbacks)


def evaluate_only(job: Job) -> int:
    """Compute loss and perplexity on the evaluation data."""
    weights = find_weights(job)
    sets = evaluation_data(job)
    built = build_parallel(job, training=False)
    sets = with_reference(job, built, sets)
    load_or_init(job, built.parts, built.layout, weights)
    result = evaluate_sets(built, sets, job.world)
    job.log(str(result))
    if job.world.is_main:
        path, row = job.output_dir / "eval_result.json", result.as_row()
        make_way(path, json_bytes(row))
        write_json(path, row)
    return EXIT_OK


def predict(job: Job) -> int:
    """Generate text from prompts, print it and write it to files; or chat."""
    if job.config.interactive:
        return chat(job)
    strictness = Strictness(strict=True, tally=Tally())
    prompts = read_prompts(job.config.input_data, strictness)
    check_same(
        job.world, {"--predict_data": [prompt.content for prompt in prompts]},
        rule="all ranks need the same prompts", advice="Copy the file of prompts to every machine",
    )  # fmt: skip
    check_writable(result_path(job))
    weights = find_weights(job)
    trained = None if weights is None else weights.trained
    setup, encoded = prepare_prompts(job, trained, prompts, strictness)
    forward, layout = build_predicting(job)
    check_lengths(job, forward, setup, encoded)
    load_or_init(job, ModelParts([forward.model]), layout, weights)
    batch_size = texts_in_batch(job, encoded)
    stream = open_stream(job, encoded)
    generations = continue_prompts(
        job, forward, setup, encoded, batch_size, stream.watch if stream else None
    )
    if stream:
        stream.close()
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


def train_to_the_end(job: Job, run: TrainRun, callbacks: Callbacks) -> int:
    """Train to the last step; metrics and the loss curve are finished even after an error."""
    if run.is_finished:
        early = ", where EarlyStopping ended the run" if run.is_stopped_early else ""
        job.log(f"nothing to do: step {run.state.global_step} of {run.total_steps} is done{early}")
        if isinstance(callbacks.saving, CheckpointMonitor):
            callbacks.saving.finish_interrupted_save(run)
        write_final_adapter(job, run)
        return EXIT_OK
    if write := installed(STRATEGY_WRITERS).get("own"):
        write(job, run.model.layout, run.model.mappings_of, run.optimizer.state_names)
    job.log(
        f"training: steps {run.state.global_step + 1} to {run.total_steps}, "
        f"{run.steps_per_epoch} an epoch, {run.loader.global_batch} samples a step, "
        f"{job.world.size} {'rank' if job.world.size == 1 else 'ranks'} on {job.world.device.type}"
    )
    reporting = open_reporting(job, run) if job.world.is_main else None
    if reporting:
        callbacks = replace(callbacks, reports=[reporting, *callbacks.reports])
    try:
        fit_with_roll_back(job, run, callbacks)
    finally:
        run.loader.close()
        if reporting:
            reporting.close(run)
    write_final_adapter(job, run)
    if isinstance(callbacks.saving, CheckpointMonitor):
        job.log(next_steps(job, resolved_name("train")))
    return EXIT_OK
