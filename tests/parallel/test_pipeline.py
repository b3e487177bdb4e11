"""Pipelines of real ranks against the whole decoder in one process: losses and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launcher.layout.mesh import Mesh
from launcher.parallel import world
from launcher.parallel.meshes import DATA_AXES, Meshes
from launcher.parallel.pipeline import Pipeline
from launcher.parallel.schedules import SCHEDULES, broken_rule, schedule_name
from launcher.parallel.tied import equalise, tied_copies
from launcher.train.loss import IGNORED_LABEL, token_loss_sum
from models.build import blocks
from models.decoder import Decoder
from models.spec import DecoderConfig
from models.stage import StageSplit, cut_to_stage, stage_split
from tests.models.tiny import VOCABULARY, dense_spec
from tests.ranks import run_ranks

TOLERANCE = 1e-5
LENGTH = 12
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Case:
    """One pipeline, and what passes through it."""

    schedule: str
    per_rank: int = 1
    micro_batches: int = 4
    tied: bool = False
    packed: bool = False
    dropout: bool = False
    counts: tuple[int, ...] | None = None
    layers: int = 8
    rows: int = 2
    """Of a micro-batch."""


def config_of(case: Case) -> DecoderConfig:
    rate = 0.1 if case.dropout else 0.0
    spec = dense_spec(
        type="Qwen3Config", num_layers=case.layers, hidden_size=32, intermediate_size=48,
        head_dim=8, tie_word_embeddings=case.tied, attention_dropout=rate, hidden_dropout=rate,
    )  # fmt: skip
    assert spec.decoder is not None
    return spec.decoder


def whole(case: Case) -> Case:
    """What matters to a decoder that is not in stages."""
    return replace(case, schedule="", per_rank=1, counts=None)


@cache
def whole_decoder(case: Case) -> Decoder:
    """All layers, the same numbers in every process. `case` is a `whole` one."""
    model = Decoder(config_of(case))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise * 0.1 if parameter.ndim == 1 else noise * 0.15)
    return model


def batch(case: Case, *, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Ids, labels and arguments of all micro-batches; some rows have more targets than others."""
    rows = case.rows * case.micro_batches
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(3, VOCABULARY, (2, rows, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (rows, 1), generator=generator)
    labels = labels.masked_fill(torch.arange(LENGTH) >= lengths, IGNORED_LABEL)
    arguments: dict[str, Any] = {"position_ids": None, "total": LENGTH}
    if case.packed:
        starts = torch.rand(rows, LENGTH, generator=generator) < 0.3
        starts[:, 0] = True
        places = torch.arange(LENGTH).expand(rows, LENGTH)
        document_ids = starts.long().cumsum(1)
        first = torch.where(starts, places, 0).cummax(1).values
        arguments |= {"document_ids": document_ids, "position_ids": places - first}
        arguments |= {"places": torch.arange(LENGTH)}  # goes to every micro-batch as it is
    if case.dropout:
        arguments["sample_seeds"] = torch.randint(0, 2**62, (rows,), generator=generator)
    return ids, labels, arguments


def scaled(labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    scale = 1.0 / int((labels != IGNORED_LABEL).sum())
    return lambda logits, targets: token_loss_sum(logits, targets) * scale


@cache
def reference(case: Case, seed: int) -> tuple[float, dict[str, Tensor], float]:
    """Training loss, gradients and evaluation loss of the whole decoder on all rows at once."""
    model = copy.deepcopy(whole_decoder(case))
    ids, labels, arguments = batch(case, seed=seed)
    loss = scaled(labels)(model.train()(ids, **arguments), labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        evaluated = scaled(labels)(model.eval()(ids, **arguments), labels)
    return loss.item(), gradients, evaluated.item()  # type: ignore[return-value]


def split_of(case: Case, ranks: int) -> StageSplit:
    return stage_split(
        config_of(case), ranks, per_rank=case.per_rank, counts=case.counts,
        v_shaped=SCHEDULES[case.schedule].v_shaped,
    )  # fmt: skip


def stages_of(case: Case, split: StageSplit, rank: int) -> dict[int, Decoder]:
    model = whole_decoder(whole(case))
    return {s: cut_to_stage(copy.deepcopy(model), split, s) for s in split.stages_of(rank)}


def pipeline_of(case: Case, group: Any, stages: dict[int, Decoder], split: StageSplit) -> Pipeline:
    return Pipeline(stages, split, schedule=case.schedule, group=group,
                    micro_batches=case.micro_batches, device=torch.device("cpu"),
                    dtype=torch.float32)  # fmt: skip


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def named(stages: dict[int, Decoder]) -> list[tuple[str, nn.Parameter]]:
    return [item for module in stages.values() for item in module.named_parameters()]


def gradient_error(stages: dict[int, Decoder], expected: dict[str, Tensor]) -> float:
    errors = [0.0]
    for name, parameter in named(stages):
        assert parameter.grad is not None, name
        gradient = parameter.grad
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        errors.append(error(full, expected[name]))
        parameter.grad = None
    return max(errors)


def run_case(case: Case, group: Any) -> dict[str, float]:
    """Errors, relative to the largest number, of two steps, another shape, and evaluations."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    split = split_of(case, ranks)
    stages = stages_of(case, split, rank)
    pipeline = pipeline_of(case, group, stages, split)
    copies = None
    if case.tied:
        held = [p for name, p in named(stages) if name == EMBEDDING]
        copies = tied_copies(Mesh(pp=ranks), split, held)
    errors = {}
    for step, shown in enumerate([case, case, replace(case, rows=case.rows + 1)]):
        ids, labels, arguments = batch(shown, seed=step)
        expected = reference(whole(shown), step)
        loss = pipeline.train(ids, labels, scaled(labels), arguments)
        if copies is not None:
            copies.add_up_gradients()
        errors[f"loss {step}"] = loss_error(loss, expected[0], group)
        errors[f"gradients {step}"] = gradient_error(stages, expected[1])
        count = case.micro_batches if step == 1 else 1
        loss = pipeline.evaluate(ids, labels, scaled(labels), arguments, micro_batches=count)
        errors[f"evaluation {step}"] = loss_error(loss, expected[2], group)
        assert all(module.training for module in stages.values())
    return errors


def loss_error(loss: Tensor, expected: float, group: Any) -> float:
    """Only one rank of the pipeline has a loss, so that the sum is the loss."""
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert not loss.requires_grad
    total = loss.clone()
    dist.all_reduce(total, group=group)
    return abs(total.item() - expected) / expected


def run_cases(cases: list[Case]) -> list[dict[str, float]]:
    world.start(force_cpu=True)
    return [run_case(case, dist.group.WORLD) for case in cases]


def bad_ones(ranks: int, cases: list[Case], function: Callable[..., Any]) -> list[Any]:
    results = run_ranks(ranks, function, cases)
    return [
        (rank, case, name, value)
        for rank, found in enumerate(results)
        for case, errors in zip(cases, found, strict=True)
        for name, value in errors.items()
        if not value <= TOLERANCE
    ]


TWO_RANKS = [
    Case("gpipe"),
    Case("gpipe", per_rank=2, tied=True),
    Case("1f1b", packed=True, dropout=True),
    Case("1f1b", tied=True, micro_batches=5, counts=(5, 3)),
    Case("interleaved_1f1b", per_rank=2, packed=True),
    Case("interleaved_1f1b", per_rank=4, tied=True),
    Case("interleaved_zero_bubble", tied=True, micro_batches=6),
    Case("interleaved_zero_bubble", per_rank=2, packed=True, dropout=True, counts=(3, 2, 2, 1)),
    Case("zero_bubble_v", per_rank=2, packed=True),
    Case("zero_bubble_v", per_rank=2, tied=True, dropout=True, counts=(3, 2, 2, 1)),
]
FOUR_RANKS = [
    Case("gpipe", tied=True),
    Case("1f1b", counts=(3, 2, 2, 1), micro_batches=8, packed=True, dropout=True),
    Case("1f1b", tied=True),
    Case("interleaved_1f1b", per_rank=2, micro_batches=8, tied=True),
    Case("interleaved_zero_bubble", counts=(3, 2, 2, 1), packed=True),
    Case("zero_bubble_v", per_rank=2, micro_batches=8, dropout=True),
    Case("zero_bubble_v", per_rank=2, micro_batches=4, tied=True, packed=True),
    Case("zero_bubble_v", per_rank=2, micro_batches=1),
]


def test_two_ranks_compute_what_one_does() -> None:
    assert bad_ones(2, TWO_RANKS, run_cases) == []


def test_four_ranks_compute_what_one_does() -> None:
    assert bad_ones(4, FOUR_RANKS, run_cases) == []


SHARDED = [
    Case("1f1b", packed=True, dropout=True),
    Case("gpipe", per_rank=2),
    Case("interleaved_zero_bubble", tied=True),
    Case("zero_bubble_v", per_rank=2, packed=True, dropout=True),
    Case("zero_bubble_v", per_rank=2, tied=True),
]


def run_sharded(cases: list[Case], together: int, **axes: int) -> list[dict[str, float]]:
    """Pipeline of two ranks, each stage sharded over two data ranks, which see different rows."""
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
    copies = None
    if case.tied:
        held = [p for name, p in named(stages) if name == EMBEDDING]
        copies = tied_copies(meshes.layout, split, held)
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
        if copies is not None:
            copies.add_up_gradients()
        expected = reference(whole(both), step)
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


def run_pieces(cases: list[Case]) -> list[dict[str, float]]:
    return run_sharded(cases, together=1, dp_shard=2)


def run_copies(cases: list[Case]) -> list[dict[str, float]]:
    return run_sharded(cases, together=3, dp_replicate=2)


@pytest.mark.parametrize("function", [run_pieces, run_copies])
def test_stages_sharded_over_data_ranks(function: Callable[..., Any]) -> None:
    assert bad_ones(4, SHARDED, function) == []


def same_twice() -> list[bool]:
    """Whether a step repeated, with evaluations of other shapes between, gives the same bits."""
    world.start(force_cpu=True)
    results = []
    for name, per_rank in [("1f1b", 1), ("zero_bubble_v", 2)]:
        case = Case(name, per_rank, packed=True, dropout=True)
        split = split_of(case, 2)
        stages = stages_of(case, split, dist.get_rank())
        pipeline = pipeline_of(case, dist.group.WORLD, stages, split)
        ids, labels, arguments = batch(case)
        found = []
        for _ in range(2):
            loss = pipeline.train(ids, labels, scaled(labels), arguments)
            found.append([loss, *(p.grad for _, p in named(stages))])
            for _, parameter in named(stages):
                parameter.grad = None
            pipeline.evaluate(ids[:1], labels[:1], scaled(labels))
        results.append(all(torch.equal(a, b) for a, b in zip(*found, strict=True)))
    return results


def test_a_step_repeated_gives_the_same_bits() -> None:
    assert run_ranks(2, same_twice) == [[True, True]] * 2


def gradients_accumulate() -> float:
    world.start(force_cpu=True)
    case = Case("zero_bubble_v", per_rank=2)
    split = split_of(case, 2)
    stages = stages_of(case, split, dist.get_rank())
    pipeline = pipeline_of(case, dist.group.WORLD, stages, split)
    ids, labels, arguments = batch(case)
    for _ in range(2):
        pipeline.train(ids, labels, scaled(labels), arguments)
    return gradient_error(stages, {n: 2 * g for n, g in reference(whole(case), 0)[1].items()})


def test_gradients_are_added_to_what_is_there() -> None:
    assert max(run_ranks(2, gradients_accumulate)) <= TOLERANCE


def refusals() -> dict[str, str]:
    """What is said of pipelines that do not fit, each on all ranks."""
    world.start(force_cpu=True)
    rank = dist.get_rank()
    case = Case("1f1b")
    split = split_of(case, 2)
    stages = stages_of(case, split, rank)
    looped = split_of(Case("gpipe", per_rank=2), 2)
    other = split_of(case, 2).stages_of(1 - rank)[0]
    attempts: dict[str, Callable[[], Any]] = {
        "micro-batches": lambda: pipeline_of(
            replace(case, micro_batches=1), dist.group.WORLD, stages, split
        ),
        "per rank": lambda: pipeline_of(
            replace(case, schedule="zero_bubble_v"), dist.group.WORLD, stages, split
        ),
        "loop for V": lambda: pipeline_of(
            Case("zero_bubble_v", 2), dist.group.WORLD, {}, looped
        ),
        "wrong stage": lambda: pipeline_of(
            case, dist.group.WORLD, {other: stages[split.stages_of(rank)[0]]}, split
        ),
        "wrong module": lambda: pipeline_of(
            case, dist.group.WORLD, {rank: whole_decoder(whole(case))}, split
        ),
        "rows": lambda: pipeline_of(case, dist.group.WORLD, stages, split).train(
            torch.zeros(6, 4, dtype=torch.int64), torch.zeros(6, 4, dtype=torch.int64),
            token_loss_sum,
        ),
    }  # fmt: skip
    said = {}
    for name, attempt in attempts.items():
        with pytest.raises(ValueError) as raised:
            attempt()
        said[name] = str(raised.value)
    return said


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    said = run_ranks(2, refusals)
    assert said[0] | {"wrong stage": ""} == {
        "micro-batches": "1f1b on 2 ranks needs at least 2 micro-batches, not 1",
        "per rank": "zero_bubble_v has 2 stages a rank, not 1",
        "loop for V": "zero_bubble_v has its stages on ranks [0, 1, 1, 0], not [0, 1, 0, 1]",
        "wrong stage": "",
        "wrong module": "the module of stage 0 is cut for another stage",
        "rows": "6 rows do not make 4 equal micro-batches",
    }
    assert [answers["wrong stage"] for answers in said] == [
        "rank 0 of the pipeline has stages (0,), not (1,)",
        "rank 1 of the pipeline has stages (1,), not (0,)",
    ]


def fails_in_a_stage() -> str:
    world.start(force_cpu=True)
    case = Case("1f1b")
    split = split_of(case, 2)
    stages = stages_of(case, split, dist.get_rank())
    pipeline = pipeline_of(case, dist.group.WORLD, stages, split)
    ids, labels, _ = batch(case)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise FloatingPointError("of the loss")

    try:
        pipeline.train(ids, labels, loss)
    except Exception as exception:
        return repr(exception)
    return "nothing"


def test_an_error_in_a_stage_comes_out_as_it_is() -> None:
    """The other rank learns of it when the process is gone: its connection breaks."""
    first, last = run_ranks(2, fails_in_a_stage)
    assert last == "FloatingPointError('of the loss')"
    assert first.startswith("RuntimeError(")
    assert "onnection" in first


@pytest.mark.parametrize(
    ("scheduler", "interleave", "name"),
    [
        ("1f1b", False, "1f1b"),
        ("1f1b", True, "interleaved_1f1b"),
        ("interleaved_1f1b", False, "interleaved_1f1b"),
        ("gpipe", True, "gpipe"),
        ("zero_bubble_v", False, "zero_bubble_v"),
    ],
)
def test_schedule_names(scheduler: str, interleave: bool, name: str) -> None:
    assert schedule_name(scheduler, interleave) == name
    assert name in SCHEDULES


@pytest.mark.parametrize(
    ("name", "per_rank", "micro_batches", "rule"),
    [
        ("gpipe", 1, 1, None),
        ("1f1b", 1, 4, None),
        ("1f1b", 2, 4, "1f1b has 1 stages a rank, not 2"),
        ("interleaved_1f1b", 2, 3, None),
        ("interleaved_1f1b", 2, 10, None),
        (
            "interleaved_1f1b", 2, 9,
            "interleaved_1f1b on 4 ranks runs 9 micro-batches in 2 rounds, which must be equally "
            "long",
        ),
    ],
)  # fmt: skip
def test_rules_of_schedules(name: str, per_rank: int, micro_batches: int, rule: str | None) -> None:
    found = broken_rule(name, ranks=4, per_rank=per_rank, micro_batches=micro_batches)
    assert found == rule


def test_equalise_copies_the_first_to_the_second() -> None:
    first, second = nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.zeros(3))
    moment = torch.ones(2)
    equalise([first, torch.full((2,), 4.0)], [second, moment])
    assert second.tolist() == [0, 1, 2]
    assert moment.tolist() == [4, 4]
