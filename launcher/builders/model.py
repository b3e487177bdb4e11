"""The model of a job: this rank's part of it, allocated, with undefined values."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from launcher.builders.compile_mode import compiler_of
from launcher.builders.job import DTYPES, Job
from launcher.builders.layer_memory import (
    check_layers,
    materialize_all,
    offload_policy,
    prepare_layers,
)
from launcher.builders.layout import model_layout, predict_split
from launcher.builders.loss import loss_of
from launcher.builders.preference import preference_loss, preference_task
from launcher.config.derived import pipeline_schedule, predict_mesh_of
from launcher.generation.distributed import DistributedForward
from launcher.generation.forward import Forward
from launcher.generation.graphs import GraphedForward, can_be_recorded
from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh
from launcher.parallel.apply import Precisions, parallelize, shard_model
from launcher.parallel.compiling import Compiler
from launcher.parallel.context import ContextParallel
from launcher.parallel.grad_all_reduce import GradAllReduce, make_grad_all_reduce
from launcher.parallel.meshes import Meshes
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.pipeline import Pipeline
from launcher.parallel.tensor import gather_logits
from launcher.parallel.world import World
from launcher.train.compute import BatchSharder, Compute, FullModel, PipelinedModel
from launcher.train.run import BuiltModel
from models.build import blocks, build_model, mappings_of, materialize, parameter_count
from models.decoder import Decoder
from models.flops import training_flops
from models.lora_config import is_saved
from models.stage import StageSplit, keep_stage
from models.trained import trained_parameters


def build_parallel(job: Job, *, training: bool) -> BuiltModel:
    """The model of the job, sharded as configured, with real memory.

    Raises `UserError` for what the model does not support.
    """
    usual = torch.float32 if training else job.compute_dtype
    dtype = job.dtype(job.spec.precision.params_dtype, otherwise=usual)
    full = build_model(job.spec, dtype=dtype)
    count = parameter_count(full)
    flops = training_flops(full, job.spec) if training else None
    sizes = {name: parameter.numel() for name, parameter in full.named_parameters()}
    layout = model_layout(
        full, job.spec, job.mesh, split=job.split,
        vocab_emb_dp=job.config.parallel_config.vocab_emb_dp,
    )  # fmt: skip
    job.meshes.make(experts=job.spec.decoder is not None and job.spec.decoder.experts is not None)
    context = context_parallel(job)
    modules = _stages(job, full, dtype)
    offload = offload_policy(job) if training else None
    compiler = None
    if training:
        check_layers(job, full)
        compiler = compiler_of(job, is_decoder=isinstance(full, Decoder))
    sharded = job.mesh.dp_shard > 1 or job.compute_dtype != dtype or offload is not None
    kept: list[FSDPModule] = []
    for module in modules.values():
        if isinstance(module, Decoder):
            module.by_documents = job.config.attention_by_documents
            sequence = job.config.parallel_config.use_seq_parallel and job.mesh.tp > 1
            parallelize(module, layout.specs, job.meshes, sequence=sequence, context=context)
        if training:
            prepare_layers(job, module, full, compiler)
        if sharded:
            kept += shard_model(
                module, blocks(module), job.meshes,
                precisions=Precisions(job.compute_dtype, dtype),
                blocks_together=job.config.parallel_config.gradient_aggregation_group,
                offload=offload, reshard_after_forward=_resharding(job),
            )  # fmt: skip
        materialize_all(module, job.world.device, offload)
    trained = trained_parameters(full)
    job.log(
        f"model: {job.spec.family}, {count:,} parameters "
        f"({_name(dtype)}, computing in {_name(job.compute_dtype)})"
    )
    if training and len(trained) < len(sizes):
        part = sum(sizes[name] for name in trained)
        job.log(f"trained: {part:,} parameters ({part / count:.2%}), the others are frozen")
    if job.mesh.world_size > 1:
        job.log(f"layout: {_layout_text(job)}")
    parts = ModelParts(
        list(modules.values()),
        _grad_all_reduce(job, modules) if training and not sharded else None,
        kept=kept,
    )
    at = job.mesh.coordinates(job.world.rank)
    batch_sharder = BatchSharder(
        job.world.device,
        token_indices=None
        if context is None
        else lru_cache(partial(_token_indices, context, job.world.device)),
        counts=at["tp"] == 0 and at["pp"] == 0,
    )
    return BuiltModel(
        parts=parts, layout=layout, trained=trained,
        mappings_of=mappings_of(parts.modules[-1]), compute=_compute(job, parts, modules, compiler),
        batch_sharder=batch_sharder, flops=flops, preference=preference_task(job, parts.modules),
        saves=partial(is_saved, lora=job.spec.lora),
    )  # fmt: skip


def _resharding(job: Job) -> bool | None:
    """`reshard_after_forward` as `shard_model` takes it."""
    written = job.config.parallel_config.reshard_after_forward
    return None if isinstance(written, str) else written


def _layout_text(job: Job) -> str:
    """The axes of more than one rank, and how many layers each pipeline stage has."""
    axes = _axes_text(job.mesh)
    if job.split is None:
        return axes
    counts = ", ".join(str(len(layers)) for layers in job.split.layers)
    return f"{axes} ({pipeline_schedule(job.config)}, stages of {counts} layers)"


def _axes_text(mesh: Mesh) -> str:
    """The axes of more than one rank: `dp_replicate 2 x tp 4`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.sizes().items() if size > 1)


def _token_indices(context: ContextParallel, device: torch.device, total: int) -> torch.Tensor:
    return context.token_indices(total).to(device)


def _grad_all_reduce(job: Job, modules: dict[int, nn.Module]) -> GradAllReduce | None:
    """The all-reduce of gradients where parameters are replicated: FSDP would copy them."""
    if job.mesh.data_parallel * job.mesh.cp == 1:
        return None
    layers = [layer for module in modules.values() for layer in blocks(module)]
    together = job.config.parallel_config.gradient_aggregation_group
    return make_grad_all_reduce(list(modules.values()), layers, job.meshes, together=together)


def _stages(job: Job, full: nn.Module, dtype: torch.dtype) -> dict[int, nn.Module]:
    """This rank's stages, by number; without a pipeline the full model is stage 0."""
    if job.split is None:
        return {0: full}
    mine = job.split.stages_of(job.mesh.coordinates(job.world.rank)["pp"])
    models = [build_model(job.spec, dtype=dtype) for _ in mine]
    return {
        stage: keep_stage(model, job.split, stage)  # type: ignore[arg-type]
        for stage, model in zip(mine, models, strict=True)
    }


def _compute(
    job: Job, parts: ModelParts, modules: dict[int, nn.Module], compiler: Compiler | None
) -> Compute:
    loss = loss_of(job, parts.modules[-1], compiler)
    preference = preference_loss(job, loss)
    at = job.mesh.coordinates(job.world.rank)
    # Ranks with other tokens of the same sequences all have the loss of a sample.
    counts = at["tp"] == 0 and (preference is None or at["cp"] == 0)
    if job.split is None:
        return FullModel(parts, loss, counts, preference)
    group = job.meshes.group("pp")
    assert group is not None
    pipeline = Pipeline(
        {stage: module for stage, module in modules.items() if isinstance(module, Decoder)},
        job.split,
        group=group,
        schedule=pipeline_schedule(job.config),
        micro_batches=job.config.parallel_config.micro_batch_num,
        device=job.world.device,
        dtype=job.compute_dtype,
    )
    return PipelinedModel(pipeline, loss, counts, preference)


def context_parallel(job: Job) -> ContextParallel | None:
    """How the tokens of a row are spread over ranks; None: they are not."""
    if job.mesh.cp == 1:
        return None
    groups = {axis: job.meshes.context_group(axis) for axis in ("ulysses", "ring")}
    return ContextParallel(**groups)


def predict_mesh(job: Job) -> Mesh:
    """The axes of prediction and their sizes."""
    return predict_mesh_of(job.config, job.spec.decoder)


def build_predicting(job: Job) -> tuple[Forward, Layout]:
    """This rank's part of the model for prediction, and its layout; values are undefined.

    In the configured compute dtype, else the dtype in config.json, else the default one.
    """
    written = job.spec.hf_config.get("dtype") or job.spec.hf_config.get("torch_dtype")
    if job.spec.precision.compute_dtype is None and written in DTYPES:
        dtype = DTYPES[written]
    else:
        dtype = job.compute_dtype
    model, mesh = build_model(job.spec, dtype=dtype), predict_mesh(job)
    if isinstance(model, Decoder):
        model.by_documents = job.config.attention_by_documents
    count, split = parameter_count(model), predict_split(job.config, job.spec)
    layout = model_layout(
        model, job.spec, mesh, split=split, vocab_emb_dp=job.config.parallel_config.vocab_emb_dp
    )
    if isinstance(model, Decoder) and mesh.tp * mesh.pp * mesh.ep > 1:
        forward: Forward = distribute(model, layout, split, job.world)
    else:
        forward = _forward_of(job, model)
        materialize(model, job.world.device)
    job.log(f"model: {job.spec.family}, {count:,} parameters ({_name(dtype)})")
    if mesh.world_size > 1:
        counts = ", ".join(str(len(layers)) for layers in split.layers) if split else ""
        job.log(f"layout: {_axes_text(mesh)}{f' (stages of {counts} layers)' if split else ''}")
    return forward, layout


def _forward_of(job: Job, model: nn.Module) -> Forward:
    """The forward of a complete model."""
    graphs = job.config.generation_config.cuda_graphs and job.world.device.type == "cuda"
    if graphs and isinstance(model, Decoder) and can_be_recorded(model):
        return GraphedForward(model)
    return Forward(model)


def distribute(
    model: Decoder, layout: Layout, split: StageSplit | None, world: World
) -> DistributedForward:
    """The forward of this rank's shards of its stage of `model`, which is complete and on the meta
    device; values are undefined. Called by all ranks of the layout together."""
    meshes = Meshes(layout.mesh, world.device.type)
    meshes.make(experts=model.config.experts is not None)
    if split is not None:
        keep_stage(model, split, layout.mesh.coordinates(world.rank)["pp"])
    parallelize(model, layout.specs, meshes, sequence=False, context=None)
    group = meshes.group("tp")
    if group is not None and model.ends:
        gather_logits(model, group)
    materialize(model, world.device)
    return DistributedForward(model, meshes, world.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
