"""The start of a job: this process joins the others, its kernels are chosen, and a line lists them.

Owns the order that CUDA needs: environment variables, then the device, then the kernels, all before
the first operation; and the line at the start of a run. A part of the line is a function in
`PARTS`, which gives an empty text where it has nothing to report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from launcher.builders.job import Job
from launcher.config.schema import Config
from launcher.config.shared import shared_settings
from launcher.parallel import world as worlds
from launcher.parallel.consistency import check_same
from launcher.parallel.kernels import (
    CUDNN,
    allocator_setting,
    naming_operations,
    set_variables,
    versions,
)
from launcher.parallel.world import World
from models.packed_attention import VARLEN, kernel_of

KEY = "deterministic"


def join(config: Config, *, ends_with_peers: bool = False) -> World:
    """Join the job. Raises `UserError` on every rank whose configuration, versions or environment
    differ from those of rank 0."""
    on_cpu = config.context.device_target == "CPU"
    if not on_cpu:
        set_variables(
            os.environ,
            deterministic=config.deterministic,
            expandable_segments=config.expandable_segments,
        )
    world = worlds.start(force_cpu=on_cpu, ends_with_peers=ends_with_peers)
    check_same(
        world, shared_settings(config), rule="all processes need the same configuration",
        advice="Start every machine with the same YAML file and the same overrides",
    )  # fmt: skip
    check_same(
        world, versions(world.device), rule="all processes need the same software and kernels",
        advice="Start every machine from the same image and with the same environment",
    )  # fmt: skip
    return world


@contextmanager
def chosen_kernels(job: Job) -> Iterator[None]:
    """What runs in this block uses the kernels of the job, and prints the line about them first.

    Raises `UserError` for an operation that the rule forbids.
    """
    if job.world.device.type == "cuda":
        job.kernels.apply()
    if line := start_line(job):
        job.log(line)
    with naming_operations(f"{KEY} = {job.config.deterministic!r}", job.provenance.nearest(KEY)):
        yield


def start_line(job: Job) -> str:
    """Which kernels and modes a job uses: `kernels: ...`; empty where it has nothing to report."""
    parts = [text for part in PARTS if (text := part(job))]
    return f"kernels: {'; '.join(parts)}" if parts else ""


def _determinism(job: Job) -> str:
    """The rule and its price, on CUDA: on the CPU there is one kernel for each operation."""
    if job.world.device.type != "cuda":
        return ""
    kernels = job.kernels
    return {
        "strict": "deterministic (costs: no cuDNN attention, slower backward pass of attention)",
        "warn": "deterministic where transformers allows it (torch warns elsewhere; gradients of "
        "attention may differ in their last bits)",
        "fast": "not deterministic",
    }[kernels.rule]


def _attention(job: Job) -> str:
    if job.world.device.type != "cuda":
        return ""
    names = {CUDNN: "cuDNN", "efficient": "memory-efficient"}
    return f"attention by {', '.join(names.get(n, n) for n in job.kernels.attention)}"


def _documents(job: Job) -> str:
    """How attention within documents, windows and padding is computed, on CUDA."""
    decoder = job.spec.decoder
    if job.world.device.type != "cuda" or decoder is None:
        return ""
    if not job.config.attention_by_documents:
        return "documents apart by a mask"
    if kernel_of(job.world.device, job.compute_dtype, decoder.head_dim) == VARLEN:
        return "documents apart by flash attention of variable lengths"
    return "documents apart by blocks of scores (flash attention has no such dtype or head size)"


def _float32(job: Job) -> str:
    """Reported where products of float32 matrices are rounded to TF32."""
    if job.world.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest":
        return ""
    return "float32 products in TF32"


def _allocator(job: Job) -> str:
    setting = allocator_setting() if job.world.device.type == "cuda" else ""
    return f"allocator {setting}" if setting else ""


def _moments(job: Job) -> str:
    dtype = job.config.optimizer.state_dtype
    if dtype != "bfloat16" or job.config.train_dataset is None:
        return ""
    return "moments of the optimizer in bfloat16, rounded stochastically (repeatable)"


PARTS: tuple[Callable[[Job], str], ...] = (
    _determinism,
    _attention,
    _documents,
    _float32,
    _allocator,
    _moments,
)
"""The parts of the line, in order."""
