"""Pipelines for tests: their batches, and the results of one process for the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.parallel.pipeline import Pipeline
from launcher.parallel.schedules import SCHEDULES
from launcher.train.loss import IGNORED_LABEL, token_loss_sum
from models.decoder import Decoder
from models.documents import document_lengths
from models.spec import DecoderConfig
from models.stage import StageSplit, keep_stage, stage_split
from tests.models.tiny import VOCABULARY, dense_spec
from tests.ranks import run_ranks

TOLERANCE = 1e-5
LENGTH = 12
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Case:
    """One pipeline, and its batch."""

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


def unsplit(case: Case) -> Case:
    """The case without the fields of stages."""
    return replace(case, schedule="", per_rank=1, counts=None)


@cache
def full_decoder(case: Case) -> Decoder:
    """All layers, with the same weights in every process. `case` must be `unsplit`."""
    return filled(Decoder(config_of(case)))


def filled(model: Decoder) -> Decoder:
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
        token_indices = torch.arange(LENGTH).expand(rows, LENGTH)
        document_ids = starts.long().cumsum(1)
        first = torch.where(starts, token_indices, 0).cummax(1).values
        arguments |= {"document_ids": document_ids, "position_ids": token_indices - first}
        arguments["document_lengths"] = document_lengths(document_ids)
        arguments |= {
            "token_indices": torch.arange(LENGTH)
        }  # passed to every micro-batch unchanged
    if case.dropout:
        arguments["sample_seeds"] = torch.randint(0, 2**62, (rows,), generator=generator)
    return ids, labels, arguments


def scaled(labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    scale = 1.0 / int((labels != IGNORED_LABEL).sum())
    return lambda logits, targets: token_loss_sum(logits, targets) * scale


@cache
def reference(case: Case, seed: int) -> tuple[float, dict[str, Tensor], float]:
    """Training loss, gradients and evaluation loss of the full decoder on all rows at once."""
    model = copy.deepcopy(full_decoder(case))
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
    model = full_decoder(unsplit(case))
    return {s: keep_stage(copy.deepcopy(model), split, s) for s in split.stages_of(rank)}


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


def loss_error(loss: Tensor, expected: float, group: Any) -> float:
    """Only one rank of the pipeline has a loss, so that the sum is the loss."""
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert not loss.requires_grad
    total = loss.clone()
    dist.all_reduce(total, group=group)
    return abs(total.item() - expected) / expected


def bad_ones(ranks: int, cases: list[Case], function: Callable[..., Any]) -> list[Any]:
    results = run_ranks(ranks, function, cases)
    return [
        (rank, case, name, value)
        for rank, found in enumerate(results)
        for case, errors in zip(cases, found, strict=True)
        for name, value in errors.items()
        if not value <= TOLERANCE
    ]
