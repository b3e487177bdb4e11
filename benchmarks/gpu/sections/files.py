"""Weights from files that are in the page cache, and saves beside training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.driver import Bench, Case, Figures
from benchmarks.gpu.peers import transformers_directory
from benchmarks.gpu.runs import job_of, training_run
from launcher.builders.job import Job
from launcher.builders.load_weights import find_weights, load_or_init
from launcher.builders.model import build_predicting
from launcher.builders.start import chosen_kernels
from launcher.checkpoint.monitor import CheckpointMonitor
from launcher.config.schema import CheckpointMonitorSection
from launcher.generation.forward import Forward
from launcher.parallel.model_parts import ModelParts
from launcher.train.loop import train_steps


def predict_job(bench: Bench, directory: str) -> Job:
    """A prediction with the weights in `directory`, in bfloat16."""
    return job_of(bench.world, {
        "run_mode": "predict",
        "input_data": "-",
        "output_dir": str(bench.folder / "output"),
        "pretrained_model_dir": directory,
        "load_checkpoint": directory,
        "model": {"model_config": {"compute_dtype": "bfloat16"}},
        "context": {"device_target": "CPU" if not bench.on_cuda else "GPU"},
    })  # fmt: skip


def loaded(job: Job) -> Forward:
    """The model of a job, as `predict` loads it."""
    with chosen_kernels(job):
        weights = find_weights(job)
        forward, layout = build_predicting(job)
        load_or_init(job, ModelParts([forward.model]), layout, weights)
    return forward


def load(bench: Bench) -> Iterator[Case]:
    """The bfloat16 weights of 1B, read once before."""
    directory = transformers_directory(bench, bench.sizes.train_1b)
    files = sorted(Path(directory).glob("*.safetensors"))
    nbytes = sum(len(file.read_bytes()) for file in files)

    def timed(read: Any) -> Figures:
        started = bench.now()
        held = read()
        seconds = bench.now() - started
        del held
        return {"load_seconds": seconds, "gb_per_second": nbytes / seconds / 1e9}

    def by_safetensors() -> Any:
        from safetensors.torch import load_file

        return [load_file(file, device=str(bench.device)) for file in files]

    def by_transformers() -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, device_map=str(bench.device)
        )

    yield Case("Slipway", lambda: timed(lambda: loaded(predict_job(bench, directory))))
    yield Case("safetensors load_file", lambda: timed(by_safetensors))
    yield Case("transformers from_pretrained", lambda: timed(by_transformers))
    yield Case("Slipway again", lambda: timed(lambda: loaded(predict_job(bench, directory))))


def save(bench: Bench) -> Iterator[Case]:
    """1B with its moments: how long a step waits for a save, and how long steps are beside it."""
    for name, in_background in (("async_save", True), ("synchronous", False)):
        yield Case(name, lambda background=in_background: saving(bench, background=background))


def saving(bench: Bench, *, background: bool) -> Figures:
    """Two saves, with steps beside them as long as they are written."""
    section = CheckpointMonitorSection(
        save_checkpoint_steps=2, async_save=background, keep_checkpoint_max=1
    )
    keys = {"model": {"model_config": {"compute_dtype": "bfloat16"}}}
    stalls, alone, beside = [], [], []
    with training_run(bench, bench.sizes.train_1b, packed=False, keys=keys) as run:
        monitor = CheckpointMonitor(section)
        monitor.on_train_begin(run)
        for step in range(1, 4 + bench.sizes.steps):
            writing = monitor.is_writing
            started = bench.now()
            records, _ = train_steps(run)
            (beside if writing else alone).append(bench.now() - started)
            if step in (2, 4):
                started = bench.now()
                monitor.on_steps_end(run, records)
                stalls.append(bench.now() - started)
        monitor.on_train_end(run)
    folder = bench.folder / "output" / "checkpoint"
    nbytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "stall_seconds": stalls,
        "steps_beside_seconds": beside,
        "steps_alone_seconds": alone[1:],
        "save_gb": nbytes / 1e9,
    }
