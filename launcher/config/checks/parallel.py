"""Rules about how a run is spread over processes: the number of them, and every axis but the
pipeline.

Each suggests the nearest possible layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from launcher.config.checks.check import Check
from launcher.config.checks.plan import (
    context_reasons,
    expert_reasons,
    nearest,
    nearest_degree,
    nearest_multiple,
    plan_of,
    tensor_reasons,
)
from launcher.config.derived import (
    context_algorithm,
    degrees,
    planned_world_size,
    row_unit,
    ulysses_degree,
)
from launcher.config.provenance import KeyProblem
from models import keys
from models.families import DECODERS

_DEGREES = (
    *("parallel_config.data_parallel", "parallel_config.model_parallel"),
    *("parallel_config.pipeline_stage", "parallel_config.context_parallel"),
    "use_parallel",
)
_MODEL_AXES = ("model_parallel", "pipeline_stage", "context_parallel", "expert_parallel")
_MODEL = ("model", "model.model_config")


def processes(check: Check) -> Iterator[KeyProblem]:
    """The product of the degrees is the number of processes."""
    world = check.world_size
    if world is None or (world == 1 and check.config.only_save_strategy):
        return
    if check.config.use_parallel is False and world > 1:
        yield check.wrong(
            "use_parallel",
            f"this job has {world} processes",
            advice="Set it to True or remove it, or start one process",
        )
        return
    sizes = degrees(check.config)
    needed = prod(sizes.values())
    if needed == world:
        return
    written = {name: size for name, size in sizes.items() if size > 1}
    product = " x ".join(f"{name} {size}" for name, size in written.items()) or "data_parallel 1"
    others = needed // sizes["data_parallel"]
    start = f"start it with `torchrun --nproc_per_node {needed} run.py ...`"
    if planned_world_size() is not None:
        start = f"pass {needed} to msrun.sh as the number of workers"
    elif needed == 1:
        start = "start it without torchrun (unset WORLD_SIZE if it is left over)"
    fits = world % others == 0
    yield check.wrong(
        "parallel_config.data_parallel",
        "the product of the parallel degrees must be the number of processes",
        what=f"{product} = {_processes(needed)}, but this job has {world}",
        nearest=f"Nearest: data_parallel {world // others}" if fits else "",
        advice=f"{'Or ' if fits else 'Change the degrees, or '}{start}",
        also=_DEGREES,
    )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def sharded_optimizer(check: Check) -> Iterator[KeyProblem]:
    """optimizer_weight_shard_size divides data_parallel."""
    key = "parallel.parallel_optimizer_config.optimizer_weight_shard_size"
    size, ranks = check.value(key), check.config.parallel_config.data_parallel
    if size == -1:
        return
    if size < 1 or ranks % size:
        yield check.wrong(
            key,
            f"must divide data_parallel ({ranks})",
            nearest=nearest(size, ranks, lambda n: ranks % n == 0),
            advice="-1 means all data-parallel ranks",
            also=("parallel_config.data_parallel",),
        )
    elif not check.config.parallel.enable_parallel_optimizer and check.provenance.is_written(key):
        yield check.wrong(
            key,
            "requires parallel.enable_parallel_optimizer: True",
            advice="Set both, or remove this key",
            also=("parallel.enable_parallel_optimizer",),
        )


def own_decoder(check: Check) -> Iterator[KeyProblem]:
    """Every axis but data parallel needs a native decoder."""
    spec = check.spec
    if spec is None or spec.decoder is not None or not check.lays_out:
        return
    for axis in _MODEL_AXES:
        if getattr(check.config.parallel_config, axis) > 1:
            yield check.wrong(
                f"parallel_config.{axis}",
                f"the transformers implementation of {spec.family} supports data parallelism only",
                nearest="Nearest: 1",
                advice=f"Use data_parallel instead. All axes work with {', '.join(DECODERS)}",
                also=_MODEL,
            )


def tensor(check: Check) -> Iterator[KeyProblem]:
    """Heads, widths and vocabulary can be split into model_parallel equal parts."""
    plan = plan_of(check, predicts=True)
    reasons = tensor_reasons(plan) if plan else []
    if plan and reasons:
        yield check.wrong(
            "parallel_config.model_parallel",
            "; ".join(reasons),
            nearest=nearest_degree(
                plan, "model_parallel", plan.decoder.num_attention_heads, tensor_reasons
            ),
            also=_MODEL,
        )


def ulysses(check: Check) -> Iterator[KeyProblem]:
    """Heads can be split over the Ulysses ranks, whose number divides context_parallel."""
    plan = plan_of(check)
    reasons = context_reasons(plan) if plan else []
    if not plan or not reasons:
        return
    parallel, inner = check.config.parallel_config, ulysses_degree(check.config)
    is_hybrid = context_algorithm(check.config) == "hybrid"
    axis = "ulysses_degree_in_cp" if is_hybrid else "context_parallel"
    divides = parallel.context_parallel % inner == 0
    yield check.wrong(
        f"parallel_config.{axis}",
        "; ".join(reasons),
        nearest=nearest_degree(plan, axis, plan.decoder.num_attention_heads, context_reasons),
        advice="Or use context_parallel_algo: colossalai_cp, which does not split heads"
        if divides
        else "",
        also=("parallel_config.model_parallel", "parallel_config.context_parallel_algo", *_MODEL),
    )


def rows(check: Check) -> Iterator[KeyProblem]:
    """Rows can be split into equal pieces by context and sequence parallel."""
    plan = plan_of(check)
    if plan is None:
        return
    parallel, unit = check.config.parallel_config, row_unit(check.config)
    causes = []
    if parallel.context_parallel > 1:
        how = context_algorithm(check.config)
        causes.append(f"context_parallel {parallel.context_parallel} ({how})")
    if parallel.use_seq_parallel and parallel.model_parallel > 1:
        causes.append(f"use_seq_parallel with model_parallel {parallel.model_parallel}")
    for key, length in plan.rows:
        if length % unit:
            yield check.wrong(
                key,
                f"must be a multiple of {unit} with {' and '.join(causes)}",
                what=f"{key} = {length}",
                nearest=nearest_multiple(length, unit, plan.decoder.max_position_embeddings),
                also=("parallel_config.context_parallel", "parallel_config.model_parallel"),
            )


def attention_dropout(check: Check) -> Iterator[KeyProblem]:
    """Attention dropout is not implemented for ranks that split a sequence."""
    decoder, ranks = check.decoder, check.config.parallel_config.context_parallel
    if decoder is None or ranks == 1 or not check.trains or not decoder.attention_dropout:
        return
    spellings = ["attention_dropout"]
    spellings += [name for name, key in keys.ALIASES.items() if key == "attention_dropout"]
    section = check.config.model.model_config
    written = next((name for name in spellings if name in section), spellings[0])
    yield check.wrong(
        f"model.model_config.{written}",
        "attention dropout is not supported with context_parallel",
        what=f"model.model_config.{written} = {decoder.attention_dropout:g}",
        nearest="Nearest: 0.0",
        advice="Or set context_parallel to 1",
        also=("parallel_config.context_parallel", *_MODEL),
    )


def dynamic_rope(check: Check) -> Iterator[KeyProblem]:
    """Dynamic RoPE depends on the length of a row, of which each rank has a part."""
    decoder, ranks = check.decoder, check.config.parallel_config.context_parallel
    scaling = decoder.rope_scaling if decoder is not None else None
    if ranks > 1 and scaling and scaling["rope_type"] == "dynamic":
        yield check.wrong(
            "parallel_config.context_parallel",
            "rope_type dynamic is not supported with context_parallel",
            nearest="Nearest: 1",
            advice="Or use another rope_type, such as yarn",
            also=_MODEL,
        )


def experts(check: Check) -> Iterator[KeyProblem]:
    """expert_parallel divides the experts and the data-parallel ranks."""
    plan = plan_of(check, predicts=True)
    reasons = expert_reasons(plan) if plan else []
    if plan and reasons:
        most = plan.decoder.experts.num_experts if plan.decoder.experts else 1
        yield check.wrong(
            "parallel_config.expert_parallel",
            "; ".join(reasons),
            nearest=nearest_degree(plan, "expert_parallel", most, expert_reasons),
            also=("parallel_config.data_parallel", *_MODEL),
        )


def warnings(check: Check) -> Iterator[str]:
    """Layouts that are allowed and probably a mistake."""
    parallel, where = check.config.parallel_config, check.provenance.where
    if parallel.use_seq_parallel and parallel.model_parallel == 1:
        key = "parallel_config.use_seq_parallel"
        yield f"{where(key)}: {key}: no effect without model_parallel"
    key = "parallel_config.ulysses_degree_in_cp"
    if parallel.ulysses_degree_in_cp > 1 and context_algorithm(check.config) != "hybrid":
        yield f"{where(key)}: {key}: used by context_parallel_algo: hybrid_cp only"
    key = "parallel_config.context_parallel_algo"
    if check.provenance.is_written(key) and parallel.context_parallel == 1:
        yield f"{where(key)}: {key}: no effect without context_parallel"
    if check.predicts:
        yield from _of_predict(check)


def _of_predict(check: Check) -> Iterator[str]:
    """Axes that predict replaces by replicas of the weights."""
    parallel, where = check.config.parallel_config, check.provenance.where
    key = "parallel_config.context_parallel"
    if parallel.context_parallel > 1 and not _is_foreign(check):
        yield f"{where(key)}: {key}: predict divides the prompts over these ranks, not their tokens"
    key = "parallel.enable_parallel_optimizer"
    if check.config.parallel.enable_parallel_optimizer and parallel.data_parallel > 1:
        yield f"{where(key)}: {key}: predict does not shard weights over data_parallel"
    cut = [axis for axis in _MODEL_AXES if getattr(parallel, axis) > 1]
    if cut and check.spec is not None and check.spec.decoder is None:
        yield (
            f"{where(f'parallel_config.{cut[0]}')}: {', '.join(cut)}: the transformers "
            f"implementation of {check.spec.family} is not split: these processes each hold the "
            "model and divide the prompts"
        )


def _is_foreign(check: Check) -> bool:
    """Whether the model is one that transformers builds, which is never split."""
    return check.spec is not None and check.spec.decoder is None
