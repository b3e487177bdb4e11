"""A layout that is checked: the configuration and the sizes of the model.

Owns the reasons why a layout is impossible, and the search for the nearest degree that is possible:
the same functions refuse a layout and choose the one to suggest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.derived import (
    pipeline_schedule,
    row_unit,
    stages_per_rank,
    ulysses_degree,
    used_datasets,
)
from launcher.config.schema import Config
from models.families import DecoderConfig

_USUAL_LENGTH = 2048
"""Row length where neither data nor model set one; see launcher/builders/data.py."""

_LARGEST_DEGREE = 1 << 16
"""Larger degrees are not searched, so that a typing error costs no time."""


@dataclass(frozen=True)
class Plan:
    """A configuration, the decoder it is for, and its rows: (key of the length, tokens)."""

    config: Config
    decoder: DecoderConfig
    rows: tuple[tuple[str, int], ...]
    predicts: bool = False
    """Whether only what prediction uses has to fit: matrices, stages and experts."""

    def with_degree(self, axis: str, value: int) -> Plan:
        """The layout with another value of `parallel_config.<axis>`."""
        changed: dict[str, Any] = {axis: value}
        degrees = replace(self.config.parallel_config, **changed)
        return replace(self, config=replace(self.config, parallel_config=degrees))


Reasons = Callable[[Plan], list[str]]
"""Why a layout is impossible; empty when it is possible."""


def plan_of(check: Check, *, predicts: bool = False) -> Plan | None:
    """The layout of a run; None where the model is not spread over processes, or has no native
    decoder.

    `predicts`: also for predict.
    """
    decoder = check.spec.decoder if check.spec and predicts else check.decoder
    if decoder is None:
        return None
    return Plan(check.config, decoder, tuple(_rows(check, decoder)), check.predicts)


def _rows(check: Check, decoder: DecoderConfig) -> Iterator[tuple[str, int]]:
    for name, section in used_datasets(check.config).items():
        length = section.seq_length or (check.spec.seq_length if check.spec else None)
        usual = min(decoder.max_position_embeddings, _USUAL_LENGTH)
        yield f"{name}.seq_length", length or usual


def tensor_reasons(plan: Plan) -> list[str]:
    """What tensor parallel cannot split into equal parts."""
    ranks, heads = plan.config.parallel_config.model_parallel, _kv_heads(plan.decoder)
    odd = [what for what, size in _matrices(plan) if size % ranks]
    reasons = [f"it does not divide {listed(odd)}"] if odd else []
    if heads % ranks and ranks % heads:
        reasons.append(f"{heads} key/value heads are neither a multiple nor a divisor of {ranks}")
    return reasons


def _matrices(plan: Plan) -> Iterator[tuple[str, int]]:
    decoder, experts = plan.decoder, plan.decoder.experts
    yield f"{decoder.num_attention_heads} attention heads", decoder.num_attention_heads
    if experts is None or not all(experts.layers):
        yield f"intermediate_size {decoder.intermediate_size}", decoder.intermediate_size
    if experts is not None:
        yield f"moe_intermediate_size {experts.intermediate_size}", experts.intermediate_size
    whose = (
        "output layer" if plan.config.parallel_config.vocab_emb_dp else "embedding and output layer"
    )
    yield f"vocab_size {decoder.vocab_size} ({whose})", decoder.vocab_size


def _kv_heads(decoder: DecoderConfig) -> int:
    """Key/value heads that are split; latent attention has one pair for each head."""
    return decoder.num_key_value_heads if decoder.latent is None else decoder.num_attention_heads


def context_reasons(plan: Plan) -> list[str]:
    """Why ranks cannot exchange sequence for heads."""
    parallel, degree = plan.config.parallel_config, ulysses_degree(plan.config)
    ranks, tensor = parallel.context_parallel, parallel.model_parallel
    if ranks == 1 or degree == 1 or plan.predicts:
        return []
    if ranks % degree:
        return [f"must divide context_parallel ({ranks})"]
    if tensor_reasons(plan):
        return []
    heads, kv_heads = plan.decoder.num_attention_heads // tensor, _kv_heads(plan.decoder)
    each = f" per rank (model_parallel {tensor})" if tensor > 1 else ""
    if heads % degree:
        return [f"{heads} attention heads{each} are not divisible by {degree}"]
    kv_heads = max(kv_heads // tensor, 1)
    if kv_heads % degree and degree % kv_heads:
        return [
            f"{kv_heads} key/value heads{each} are neither a multiple nor a divisor of {degree}"
        ]
    return []


def row_reasons(plan: Plan) -> list[str]:
    """Rows that cannot be split into equal pieces."""
    unit = row_unit(plan.config)
    return [f"{key}: not a multiple of {unit}" for key, length in plan.rows if length % unit]


def expert_reasons(plan: Plan) -> list[str]:
    """Why this many ranks cannot split the experts."""
    parallel, experts = plan.config.parallel_config, plan.decoder.experts
    ranks, data = parallel.expert_parallel, parallel.data_parallel
    data *= parallel.context_parallel if plan.predicts else 1
    if ranks == 1:
        return []
    if experts is None:
        return ["a dense model has no experts"]
    reasons = []
    if experts.num_experts % ranks:
        reasons.append(f"{experts.num_experts} experts are not divisible by {ranks}")
    if data % ranks:
        reasons.append(f"data_parallel {data} is not divisible by {ranks}")
    shard = shard_size(plan.config)
    if not reasons and not plan.predicts and shard % ranks and ranks % shard:
        reasons.append(
            f"it is neither a multiple nor a divisor of the {shard} ranks that shard weights"
        )
    return reasons


def shard_size(config: Config) -> int:
    """Ranks that shard one copy of the weights; 1 without a sharded optimizer."""
    size = config.parallel.parallel_optimizer_config.optimizer_weight_shard_size
    if not config.parallel.enable_parallel_optimizer:
        return 1
    return size if size > 0 else config.parallel_config.data_parallel


def stage_reasons(plan: Plan) -> list[str]:
    """Stages without a layer."""
    ranks, each = plan.config.parallel_config.pipeline_stage, stages_per_rank(plan.config)
    layers = plan.decoder.num_hidden_layers
    if ranks * each <= layers:
        return []
    stages = f"{ranks} x {each} = {ranks * each}" if each > 1 else f"{ranks}"
    return [f"{layers} layers are too few for {stages} stages"]


def micro_batch_reasons(plan: Plan) -> list[str]:
    """Why the schedule cannot run with this many micro-batches."""
    parallel, schedule = plan.config.parallel_config, pipeline_schedule(plan.config)
    ranks, batches = parallel.pipeline_stage, parallel.micro_batch_num
    if plan.predicts:
        return []
    if ranks > 1 and batches < ranks:
        return [f"a pipeline of {ranks} ranks needs at least {ranks} micro-batches"]
    if ranks > 1 and schedule in _ROUNDS and batches % ranks:
        return [f"{schedule} requires a multiple of pipeline_stage ({ranks})"]
    return []


_ROUNDS = ("interleaved_1f1b", "interleaved_zero_bubble")

ALL_REASONS: tuple[Reasons, ...] = (
    tensor_reasons,
    context_reasons,
    row_reasons,
    expert_reasons,
    stage_reasons,
    micro_batch_reasons,
)


def nearest_degree(plan: Plan, axis: str, most: int, reasons: Reasons) -> str:
    """`Nearest: 2 or 4`: the values of an axis around the present one, `most` at most, with which
    everything fits; where there is none, those with which `reasons` alone is empty."""
    present = getattr(plan.config.parallel_config, axis)

    def fits_all(value: int) -> bool:
        trial = plan.with_degree(axis, value)
        return not any(reason(trial) for reason in ALL_REASONS)

    def fits(value: int) -> bool:
        return not reasons(plan.with_degree(axis, value))

    return nearest(present, most, fits_all) or nearest(present, most, fits)


def nearest(present: int, most: int, fits: Callable[[int], bool]) -> str:
    """The numbers from 1 to `most` that fit, just below and just above `present`."""
    most = min(most, _LARGEST_DEGREE)
    below = next((n for n in range(min(present - 1, most), 0, -1) if fits(n)), None)
    above = next((n for n in range(present + 1, most + 1) if fits(n)), None)
    found = [str(n) for n in (below, above) if n is not None]
    return f"Nearest: {' or '.join(found)}" if found else ""


def nearest_multiple(present: int, unit: int, most: int | None = None) -> str:
    """The multiples of `unit` around `present`, positive and `most` at most."""
    below = present // unit * unit
    found = [n for n in (below, below + unit) if n > 0 and (most is None or n <= most)]
    return f"Nearest: {' or '.join(map(str, found))}" if found else ""


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
