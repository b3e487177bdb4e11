"""Pipelines together with the other axes and with experts, against one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launcher.layout.layout import ShardSpec
from launcher.layout.mesh import Mesh
from launcher.parallel import vocabulary, world
from launcher.parallel.apply import parallelize
from launcher.parallel.gradients import all_reduce_partial
from launcher.parallel.meshes import DATA_AXES, Meshes
from launcher.parallel.schedules import SCHEDULES
from launcher.parallel.tied import tied_replicas
from launcher.train.loss import IGNORED_LABEL
from models.build import blocks
from models.decoder import Decoder
from models.plan import is_partial, shard_specs
from models.stage import keep_stage, stage_split
from tests.models.tiny import VOCABULARY, experts_spec
from tests.parallel.pipelines import (
    EMBEDDING,
    Case,
    bad_ones,
    batch,
    config_of,
    filled,
    full_decoder,
    gradient_error,
    loss_error,
    named,
    pipeline_of,
    reference,
    scaled,
    split_of,
    stages_of,
    unsplit,
)
from tests.ranks import run_ranks

SHARDED = [
    Case("1f1b", packed=True, dropout=True),
    Case("gpipe", per_rank=2),
    Case("interleaved_zero_bubble", tied=True),
    Case("zero_bubble_v", per_rank=2, packed=True, dropout=True),
    Case("zero_bubble_v", per_rank=2, tied=True),
]


def run_sharded(cases: list[Case], together: int, **axes: int) -> list[dict[str, float]]:
    """Pipeline of two ranks, each stage sharded over two data ranks with different rows."""
    world.start(force_cpu=True)
    meshes = Meshes(Mesh(pp=2, **axes), "cpu")
    return [run_sharded_case(case, meshes, together) for case in cases]


def run_sharded_case(case: Case, meshes: Meshes, together: int) -> dict[str, float]:
    group = meshes.group("pp")
    rank, data = dist.get_rank(group), meshes.layout.data_rank(dist.get_rank())
    split = split_of(case, 2)
    stages = stages_of(case, split, rank)
    for module in stages.values():
        shard(module, meshes, together)
    pipeline = pipeline_of(case, group, stages, split)
    replicas = None
    if case.tied:
        held = [p for name, p in named(stages) if name == EMBEDDING]
        replicas = tied_replicas(meshes.layout, split, held)
    both = replace(case, micro_batches=2 * case.micro_batches)
    errors = {}
    for step in range(2):
        ids, labels, arguments = batch(both, seed=step)
        half = case.rows * case.micro_batches
        own = slice(data * half, (data + 1) * half)
        mine = {
            name: value[own] if isinstance(value, Tensor) and len(value) == 2 * half else value
            for name, value in arguments.items()
        }
        loss = pipeline.train(ids[own], labels[own], scaled(labels), mine)
        if replicas is not None:
            replicas.all_reduce_gradients()
        expected = reference(unsplit(both), step)
        errors[f"loss {step}"] = loss_error(loss, expected[0], None)
        errors[f"gradients {step}"] = gradient_error(stages, expected[1])
        loss = pipeline.evaluate(ids[own], labels[own], scaled(labels), mine)
        errors[f"evaluation {step}"] = loss_error(loss, expected[2], None)
        assert all(isinstance(p, DTensor) for _, p in named(stages))
    return errors


def shard(module: nn.Module, meshes: Meshes, together: int) -> None:
    mesh, layers = meshes.dense[DATA_AXES], blocks(module)
    for start in range(0, len(layers), together):
        unit = layers[start : start + together]
        fully_shard(unit if together > 1 else unit[0], mesh=mesh)
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    for part in module.modules():
        if hasattr(part, "set_gradient_divide_factor"):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def run_shards(cases: list[Case]) -> list[dict[str, float]]:
    return run_sharded(cases, together=1, dp_shard=2)


def run_replicas(cases: list[Case]) -> list[dict[str, float]]:
    return run_sharded(cases, together=3, dp_replicate=2)


@pytest.mark.parametrize(
    ("function", "cases"), [(run_shards, SHARDED), (run_replicas, SHARDED[2:4])]
)
def test_stages_sharded_over_data_ranks(function: Callable[..., Any], cases: list[Case]) -> None:
    assert bad_ones(4, cases, function) == []


def losses_of_changed_weights() -> list[float]:
    """Losses after all weights are set to zero when a pipeline has just gathered them: in
    evaluation, and in training."""
    world.start(force_cpu=True)
    meshes, results = Meshes(Mesh(pp=2, dp_shard=2), "cpu"), []
    for case in (Case("1f1b"), Case("zero_bubble_v", per_rank=2)):
        group = meshes.group("pp")
        split = split_of(case, 2)
        stages = stages_of(case, split, dist.get_rank(group))
        for module in stages.values():
            shard(module, meshes, together=1)
        pipeline = pipeline_of(case, group, stages, split)
        ids, labels, _ = batch(case)
        pipeline.train(ids, labels, scaled(labels))
        pipeline.evaluate(ids, labels, scaled(labels))
        for _, parameter in named(stages):
            parameter.detach().to_local().zero_()
        for run in (pipeline.evaluate, pipeline.train):
            loss = run(ids, labels, scaled(labels))
            dist.all_reduce(loss, group=group)
            results.append(loss.item())
    return results


def test_gathered_weights_are_not_stale() -> None:
    for losses in run_ranks(4, losses_of_changed_weights):
        assert losses == pytest.approx([math.log(VOCABULARY)] * 4)


TENSOR_PARALLEL = [
    Case("1f1b", packed=True),
    Case("zero_bubble_v", per_rank=2, tied=True, dropout=True),
    Case("interleaved_zero_bubble", packed=True, dropout=True),
]


def run_tensor_parallel(cases: list[Case], sequence: bool) -> list[dict[str, float]]:
    """Two pipeline ranks, each stage on two tensor-parallel ranks."""
    world.start(force_cpu=True)
    meshes = Meshes(Mesh(pp=2, tp=2), "cpu")
    return [run_tensor_parallel_case(case, meshes, sequence) for case in cases]


def run_tensor_parallel_case(case: Case, meshes: Meshes, sequence: bool) -> dict[str, float]:
    group, tp_group = meshes.group("pp"), meshes.group("tp")
    split = split_of(case, 2)
    stages = stages_of(case, split, dist.get_rank(group))
    names = [name for name, _ in full_decoder(unsplit(case)).named_parameters()]
    specs = shard_specs(names, config_of(case), tp=2, vocab_emb_dp=False)
    for module in stages.values():
        parallelize(module, specs, meshes, sequence=sequence, context=None)
    pipeline = pipeline_of(case, group, stages, split)
    ids, labels, arguments = batch(case)
    scale = 1.0 / int((labels != IGNORED_LABEL).sum())

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return vocabulary.token_loss_sum(logits, targets, tp_group) * scale

    trained = pipeline.train(ids, labels, loss, arguments)
    evaluated = pipeline.evaluate(ids, labels, loss, arguments)
    rule = {"tp": 2, "sequence_parallel": sequence, "tied_unsharded_embedding": False}
    config = config_of(case)
    all_reduce_partial(
        [p for n, p in named(stages) if is_partial(n, specs[n], config, **rule)], tp_group
    )
    if case.tied:
        held = [p for name, p in named(stages) if name == EMBEDDING]
        tied_replicas(meshes.layout, split, held).all_reduce_gradients()
    expected = reference(unsplit(case), 0)
    return {
        "loss": loss_error(trained, expected[0], group),
        "gradients": gradient_error(stages, own_parts(expected[1], specs, tp_group)),
        "evaluation": loss_error(evaluated, expected[2], group),
    }


def own_parts(
    full: dict[str, Tensor], specs: dict[str, ShardSpec], group: Any
) -> dict[str, Tensor]:
    """This tensor-parallel rank's shard of each tensor."""
    dims = {name: specs[name].tp_dim for name in full}
    return {
        name: tensor if (dim := dims[name]) is None else tensor.chunk(2, dim)[dist.get_rank(group)]
        for name, tensor in full.items()
    }


def run_tensor(cases: list[Case]) -> list[dict[str, float]]:
    return run_tensor_parallel(cases, sequence=False)


def run_sequence(cases: list[Case]) -> list[dict[str, float]]:
    return run_tensor_parallel(cases, sequence=True)


@pytest.mark.parametrize("function", [run_tensor, run_sequence])
def test_stages_shared_by_tensor_parallel_ranks(function: Callable[..., Any]) -> None:
    assert bad_ones(4, TENSOR_PARALLEL, function) == []


def run_experts(cases: list[Case]) -> list[dict[str, float]]:
    """Experts, with a balance loss that appears only in the gradients."""
    world.start(force_cpu=True)
    config = experts_spec("qwen3_moe", num_layers=8, hidden_size=32).decoder
    assert config is not None
    model = filled(Decoder(config))
    return [run_experts_case(case, model) for case in cases]


def run_experts_case(case: Case, model: Decoder) -> dict[str, float]:
    split = stage_split(model.config, 2, per_rank=case.per_rank,
                        v_shaped=SCHEDULES[case.schedule].v_shaped)  # fmt: skip
    mine = split.stages_of(dist.get_rank())
    stages = {stage: keep_stage(copy.deepcopy(model), split, stage) for stage in mine}
    ids, labels, arguments = batch(case)
    arguments["balance_scale"] = torch.tensor(0.05)
    expected = copy.deepcopy(model)
    expected_loss = scaled(labels)(expected(ids, **arguments), labels)
    expected_loss.backward()
    pipeline = pipeline_of(case, dist.group.WORLD, stages, split)
    loss = pipeline.train(ids, labels, scaled(labels), arguments)
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    return {
        "loss": loss_error(loss, expected_loss.item(), None),
        "gradients": gradient_error(stages, gradients),
    }


def test_experts_and_their_balance_loss() -> None:
    cases = [Case("1f1b"), Case("zero_bubble_v", per_rank=2, packed=True)]
    assert bad_ones(2, cases, run_experts) == []
