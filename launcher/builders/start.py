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
from models.grouped import has_kernel_for
from models.packed_attention import kernel_of

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
    """How the decoders of Slipway attend within documents and windows, which SDPA does not do."""
    decoder = job.spec.decoder
    if job.world.device.type != "cuda" or decoder is None or job.config.run_mode == "predict":
        return ""
    if not job.config.attention_by_documents:
        return "packed rows by a mask"
    latent = decoder.latent
    size = (
        decoder.head_dim if latent is None
        else max(latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim)
    )  # fmt: skip
    kernel = kernel_of(job.world.device, job.compute_dtype, size)
    return {
        "varlen": "packed rows by flash of variable lengths",
        "tiles": "packed rows by matrix products (flash takes bfloat16 and float16 alone)",
    }.get(kernel, "")


def _float32(job: Job) -> str:
    """Reported where products of float32 matrices are rounded to TF32."""
    if job.world.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest":
        return ""
    return "float32 products in TF32"


def _allocator(job: Job) -> str:
    setting = allocator_setting() if job.world.device.type == "cuda" else ""
    return f"allocator {setting}" if setting else ""


def _fp8(job: Job) -> str:
    recipe = job.config.fp8_config.recipe
    return f"products in FP8 ({recipe})" if recipe is not None and _trains(job) else ""


def _moments(job: Job) -> str:
    if job.config.optimizer.state_dtype != "bfloat16" or not _trains(job):
        return ""
    return "moments of the optimizer in bfloat16, rounded stochastically (repeatable)"


def _experts(job: Job) -> str:
    """How products of experts are computed on CUDA."""
    decoder = job.spec.decoder
    if job.world.device.type != "cuda" or decoder is None or decoder.experts is None:
        return ""
    sizes = decoder.experts.intermediate_size, decoder.hidden_size
    if has_kernel_for(sizes, job.compute_dtype, job.world.device):
        return "experts by one kernel"
    return "experts one by one, which waits for their token counts once a layer"


def _trains(job: Job) -> bool:
    return job.config.run_mode in (None, "train", "finetune")


PARTS: tuple[Callable[[Job], str], ...] = (
    *(_determinism, _attention, _documents, _float32, _allocator, _experts, _fp8, _moments),
)
"""The parts of the line, in order."""
