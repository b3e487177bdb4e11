"""Building a training run: data, model, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.builders.adapter import Weights, record_adapter
from launcher.builders.compile_mode import optimizer_compiler
from launcher.builders.data import evaluation_data, open_training_data, steps_per_epoch
from launcher.builders.gradients import gradients_of
from launcher.builders.job import Job
from launcher.builders.load_weights import load_or_init
from launcher.builders.model import build_parallel
from launcher.builders.open_dataset import seq_length
from launcher.builders.preference import preference_settings
from launcher.builders.reference import add_base_as_reference, add_other_reference, add_reference
from launcher.builders.run_metadata import run_metadata
from launcher.checkpoint.savable import Origin
from launcher.config.derived import global_batch_size, micro_batch_size
from launcher.config.schema import Config
from launcher.data.loader import Loader
from launcher.errors import UserError
from launcher.parallel.matrices import MatrixExchange, matrix_exchange
from launcher.report.device_peaks import TERA, peak_of
from launcher.report.run_record import INITIAL_WEIGHTS
from launcher.train.health import limits_of
from launcher.train.meter import StepMeter
from launcher.train.optimizer import Optimizer, build_optimizer
from launcher.train.run import BuiltModel, StepSettings, TrainRun
from launcher.train.scaling import LossScaling, loss_scaling
from launcher.train.schedule import build_schedule, warmup_steps
from launcher.train.state import TrainState
from launcher.weights.adapters.found import Base
from models.spec import ModelSpec
from models.transformers_model import complete_config


def fresh_run(job: Job, weights: Weights | None) -> TrainRun:
    """A run before its first step, from `weights` or from random ones."""
    run = build_run(job)
    is_other = add_other_reference(job, run) or add_base_as_reference(job, run, weights)
    load_or_init(job, run.model.parts, run.model.layout, weights)
    if not is_other:
        add_reference(job, run)
    record_adapter(run, job, Base(seed=job.config.seed) if weights is None else weights.base)
    run.metadata[INITIAL_WEIGHTS] = str(weights.path) if weights else None
    files = {file.resolve() for file in weights.inputs} if weights else set()
    run.origin = replace(run.origin, inputs=run.origin.inputs | files)
    return run


def build_run(job: Job) -> TrainRun:
    """A run at step 0, its weights undefined."""
    config, section = job.config, job.config.train_dataset
    assert section is not None
    data = open_training_data(job, section)
    loader = Loader(
        data.dataset,
        data.order,
        batch_size=micro_batch_size(config),
        micro_steps=_micro_batches(config),
        data_parallel=job.mesh.data_parallel,
        data_rank=job.mesh.data_rank(job.world.rank),
        pin_memory=job.world.device.type == "cuda",
    )
    assert loader.global_batch == global_batch_size(config)
    per_epoch = steps_per_epoch(
        data.epoch_samples, loader.global_batch, drop_remainder=section.drop_remainder
    )
    total = _total_steps(job, per_epoch)
    stop = min(total, config.runner_config.stop_step or total)
    if len(data.dataset) < loader.global_batch:
        job.log(
            f"warning: the data has {len(data.dataset)} samples, fewer than the global batch of "
            f"{loader.global_batch}: a step trains on some of them more than once"
        )
    _warn_of_warmup(job, total, stop, per_epoch)
    built = build_parallel(job, training=True)
    scaling = loss_scaling(config.runner_wrapper.scale_sense, job.compute_dtype)
    return TrainRun(
        config=config,
        world=job.world,
        model=built,
        gradients=gradients_of(job, built),
        optimizer=_optimizer(job, built),
        loader=loader,
        schedule=build_schedule(
            config.lr_schedule,
            fallback_rate=config.optimizer.learning_rate,
            total_steps=total,
            steps_per_epoch=per_epoch,
            scale=_rate_scale(job),
        ),
        settings=_settings(job, loader.global_batch, scaling),
        steps_per_epoch=per_epoch,
        total_steps=stop,
        sink_size=_sink_size(config, per_epoch),
        metadata=run_metadata(job, data, loader.global_batch, scaling),
        write_model_files=partial(_write_model_files, job, next(built.parts.parameters()).dtype),
        evaluation=evaluation_data(job) if config.do_eval else [],
        meter=_meter(job, built, seq_length(job, section)),
        origin=Origin(inputs=_inputs(config)),
        state=TrainState(loss_scale=scaling.first if scaling is not None else 1.0),
        log=job.log,
    )


def _meter(job: Job, built: BuiltModel, length: int) -> StepMeter:
    """`length`: tokens of a row."""
    given = job.config.device_peak_tflops
    return StepMeter(
        device=job.world.device,
        ranks=job.world.size,
        flops_per_token=None if built.flops is None else built.flops.per_token(length),
        peak_flops=peak_of(job.world.device, job.compute_dtype) if given is None else given * TERA,
    )


def _optimizer(job: Job, built: BuiltModel) -> Optimizer:
    def make_exchange(names: Sequence[str]) -> MatrixExchange:
        world = job.world
        return matrix_exchange(names, built.layout, built.mappings_of, world.rank, world.device)

    named = built.parts.all_named()
    return build_optimizer(
        named, built.trained, job.config.optimizer, make_exchange,
        optimizer_compiler(job) if job.config.optimizer.state_dtype is not None else None,
    )  # fmt: skip


def _settings(job: Job, global_batch: int, scaling: LossScaling | None) -> StepSettings:
    wrapper = job.config.runner_wrapper
    return StepSettings(
        max_gradient_norm=wrapper.max_grad_norm if wrapper.use_clip_grad else None,
        scaling=scaling,
        limits=limits_of(job.config),
        balance=_balance(job, global_batch),
        has_dropout=_has_dropout(job.spec),
    )


def _inputs(config: Config) -> frozenset[Path]:
    """The folder of the model and its tokenizer."""
    folder = config.pretrained_model_dir
    return frozenset({Path(folder).resolve()} if folder else ())


def _micro_batches(config: Config) -> int:
    if config.parallel_config.pipeline_stage > 1:
        return config.parallel_config.micro_batch_num
    return config.runner_config.gradient_accumulation_steps


def _total_steps(job: Job, per_epoch: int) -> int:
    """The length of the learning-rate schedule; stop_step ends the run earlier."""
    runner = job.config.runner_config
    by_epochs = runner.epochs * per_epoch
    if runner.max_steps is None:
        return by_epochs
    written = job.provenance.is_written("runner_config.epochs")
    return min(by_epochs, runner.max_steps) if written else runner.max_steps


def _warn_of_warmup(job: Job, total: int, stop: int, per_epoch: int) -> None:
    """Warn of a run that ends during its warm-up. The first step has the rate at the beginning of
    the warm-up, so that a warm-up of n steps peaks at step n + 1. `stop`: the last step of the run,
    of `total` in the schedule."""
    steps = warmup_steps(job.config.lr_schedule, total, per_epoch)
    if steps >= stop and steps > 0:
        length = f"run of {total}" if stop == total else f"run that stops at step {stop}"
        job.log(
            f"warning: {steps} warm-up steps in a {length}: the learning rate never reaches "
            "lr_schedule.learning_rate"
        )


def _sink_size(config: Config, per_epoch: int) -> int:
    runner = config.runner_config
    if not runner.sink_mode:
        return 1
    if runner.sink_size != -1:
        return runner.sink_size
    monitor = config.checkpoint_monitor
    interval = (monitor and monitor.save_checkpoint_steps) or per_epoch
    if interval % per_epoch:
        below = interval // per_epoch * per_epoch
        raise UserError(
            f"CheckpointMonitor.save_checkpoint_steps = {interval}",
            rule=f"with sink_size -1 a sink is an epoch of {per_epoch} steps, and checkpoints are "
            "saved at its end",
            nearest=f"Nearest: {f'{below} or ' if below else ''}{below + per_epoch}",
        )
    return per_epoch


def _rate_scale(job: Job) -> float:
    config = job.config
    if not config.lr_scale:
        return 1.0
    return job.world.size * config.runner_config.batch_size / config.lr_scale_factor


def _balance(job: Job, global_batch: int) -> torch.Tensor | None:
    """The weight of the balance loss of one sequence and layer in the loss of a step."""
    experts = job.spec.decoder.experts if job.spec.decoder is not None else None
    if experts is None or not experts.balance_on:
        return None
    settings = preference_settings(job.config)
    sequences = global_batch * (2 if settings is not None and settings.is_paired else 1)
    weight = experts.balance_coefficient / (sequences * sum(experts.layers))
    return torch.tensor(weight, dtype=torch.float32, device=job.world.device)


def _has_dropout(spec: ModelSpec) -> bool:
    if spec.lora is not None and spec.lora.dropout > 0:
        return True
    if spec.decoder is not None:
        return spec.decoder.attention_dropout > 0 or spec.decoder.hidden_dropout > 0
    return any("drop" in key and value for key, value in complete_config(spec).to_dict().items())


def _write_model_files(job: Job, dtype: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in job.model_files(dtype).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
