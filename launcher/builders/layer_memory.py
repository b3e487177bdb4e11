"""What is wrapped around the layers of a job: compilation, recomputation, offload, interleaving.

Owns the order, innermost first: compilation, recomputation, offload of activations, interleaved
micro-batches. FSDP's hooks are outside of all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import OffloadPolicy

from launcher.builders.job import Job
from launcher.errors import UserError
from launcher.parallel.compiling import Compiler, compile_layers, exclude_from_compile
from launcher.parallel.fp8 import apply_fp8, check_device, check_exclude, fp8_product
from launcher.parallel.interleave import interleave
from launcher.parallel.layer_modules import module_names
from launcher.parallel.offload import (
    apply_offload,
    check_offload,
    offloaded_parts,
    optimizer_policy,
)
from launcher.parallel.recompute import (
    apply_recompute,
    check_recompute,
    is_cheap,
    recompute_plan,
    recomputed_modules,
)
from launcher.parallel.recompute_operations import (
    apply_recompute_operations,
    set_compiled_budget,
)
from models.build import blocks, materialize
from models.decoder import Decoder
from models.stage import StageSplit

_RECOMPUTE, _SWAP = "recompute_config", "swap_config"


def check_layers(job: Job, full: nn.Module) -> None:
    """Check the patterns of the configuration against the layers of the full model.

    Raises UserError for those that match nothing, or that this model does not support.
    """
    names = module_names(blocks(full))
    idle = {
        _RECOMPUTE: check_recompute(job.config.recompute_config, _split(job, full), names,
                                    where=job.provenance.where),
        _SWAP: check_offload(job.config.swap_config, names, where=job.provenance.where),
    }  # fmt: skip
    for section, patterns in idle.items():
        if patterns:
            job.log(f"accepted, no effect: {section}: {patterns} keep no activations")
    if not isinstance(full, Decoder):
        _check_foreign(job)
    check_exclude(
        job.config.fp8_config.exclude, blocks(full), job.provenance.where("fp8_config.exclude")
    )
    if job.config.swap_config.optimizer and job.world.device.type != "cuda":
        job.log("accepted, no effect: swap_config.optimizer: it is on the host already")


def prepare_layers(job: Job, module: nn.Module, full: nn.Module, compiler: Compiler | None) -> None:
    """Wrap the layers of `module`, a stage of `full` or all of it, as configured for training.

    `compiler`: of the layers, see `compile_mode.compiler_of`.
    """
    config, layers = job.config, _numbered(module)
    plan = recompute_plan(config.recompute_config, _split(job, full))
    again = recomputed_modules(layers, plan)
    moving = offloaded_parts(layers, config.swap_config, again)
    apart = {
        number: {*moving[number], *(name for name in again[number] if not is_cheap(name))} - {""}
        for number in layers
    }
    if config.fp8_config.recipe is not None:
        _compute_in_fp8(job, layers)
    if compiler is not None:
        compile_layers(layers, compiler, apart, job.world.device)
    uses_rng = not isinstance(module, Decoder)
    apply_recompute(layers, again, uses_rng=uses_rng)
    _recompute_operations(job, layers, again, compiler, uses_rng=uses_rng)
    if config.swap_config.swap:
        apply_offload(layers, moving, job.world.device)
    if compiler is not None:
        exclude_from_compile(layers, apart)
    if config.micro_batch_interleave_num > 1:
        assert isinstance(module, Decoder)
        interleave(module, config.micro_batch_interleave_num)


def _recompute_operations(
    job: Job, layers: Mapping[int, nn.Module], again: Mapping[int, Collection[str]],
    compiler: Compiler | None, *, uses_rng: bool,
) -> None:  # fmt: skip
    """Recompute by operation, where it is configured, the layers that are not recomputed
    `again` in full."""
    section = job.config.recompute_config
    budget = section.memory_budget
    if budget is None and not section.recompute_operations:
        return
    if compiler is None:
        rest = {number: layer for number, layer in layers.items() if "" not in again[number]}
        apply_recompute_operations(rest, budget, uses_rng=uses_rng, log=job.log)
    elif budget is None:
        job.log("recompute by operation: the compiler keeps products and repeats what is cheap")
    else:
        set_compiled_budget(budget)
        job.log(f"recompute by operation: the compiler keeps {budget:.0%} of the activations")


def _compute_in_fp8(job: Job, layers: Mapping[int, nn.Module]) -> None:
    """Set the FP8 product of the linear layers."""
    section, where = job.config.fp8_config, job.provenance.where("fp8_config.recipe")
    assert section.recipe is not None
    if not section.emulate:
        check_device(job.world.device, where)
    product = fp8_product(section.recipe, emulate=section.emulate, where=where)
    done = apply_fp8(layers, product, section.exclude)
    left = f", {len(done.unaligned)} left for sizes that are no multiples of 16" * bool(
        done.unaligned
    )
    left += f", {done.excluded} excluded" * bool(done.excluded)
    if not done.names:
        job.log(f"warning: {where}: fp8_config.recipe: no linear layer is computed in FP8{left}")
        return
    job.log(
        f"fp8: {len(done.names)} linear layers {section.recipe}{left}; results differ from "
        f"{str(job.compute_dtype).removeprefix('torch.')} by the rounding of operands to 8 bits"
    )


def offload_policy(job: Job) -> OffloadPolicy | None:
    """The policy that keeps parameters and optimizer state in host memory, where it is configured
    and the device has memory of its own; else None."""
    return optimizer_policy(job.world.device) if job.config.swap_config.optimizer else None


def materialize_all(module: nn.Module, device: torch.device, offload: OffloadPolicy | None) -> None:
    """Allocate `module`: on the device, or its parameters on the host."""
    if offload is None:
        materialize(module, device)
        return
    materialize(module, "cpu")
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _check_foreign(job: Job) -> None:
    """Raise UserError for what only Slipway's decoder supports."""
    select = job.config.recompute_config.select_recompute
    names_modules = isinstance(select, dict) or (
        isinstance(select, list) and any(isinstance(item, str) for item in select)
    )
    refused = {
        "micro_batch_interleave_num": job.config.micro_batch_interleave_num > 1,
        f"{_RECOMPUTE}.select_recompute": bool(select) and not names_modules,
        "fp8_config.recipe": job.config.fp8_config.recipe is not None,
    }
    for key, asks in refused.items():
        if asks:
            raise UserError(
                key,
                where=job.provenance.where(key),
                rule=f"not built for {job.spec.family}, a model type that runs through its "
                "transformers module",
                advice="Name modules, or leave it out" if "select" in key else "Leave it out",
            )


def _numbered(module: nn.Module) -> Mapping[int, nn.Module]:
    """The layers of a module by their number in the model."""
    if isinstance(module, Decoder):
        return {int(number): layer for number, layer in module.model.layers.items()}
    return dict(enumerate(blocks(module)))


def _split(job: Job, full: nn.Module) -> StageSplit:
    """The layers of each rank of the pipeline; without one, all layers."""
    return job.split or StageSplit((range(len(blocks(full))),), (0,))
