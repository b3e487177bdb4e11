"""Evaluation: the loss per target token and the perplexity over data sets, and when it is due.

Invariant: results are sums over all ranks, so that every rank has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from launcher.data.loader import Batch
from launcher.parallel.world import World
from launcher.train.compute import MicroBatch, by_source
from launcher.train.loss import IGNORED_LABEL

if TYPE_CHECKING:
    from launcher.train.run import BuiltModel, TrainRun
    from launcher.train.step import StepRecord


@dataclass(frozen=True)
class EvaluationSet:
    """One data set that a model is evaluated on."""

    name: str
    """Empty for `eval_dataset`, which is the only set."""
    batches: Callable[[], Iterable[Batch]]
    """This rank's share, equally many batches on every rank."""
    sources: tuple[str, ...] = ()
    """The names of the sources; none where the data is no mixture."""


@dataclass(frozen=True)
class EvaluationResult:
    """`loss` in nats per target token, over `tokens` of them."""

    loss: float
    tokens: int
    sources: Mapping[str, float] = field(default_factory=dict)
    """The loss of each source of a mixture that has target tokens."""
    sets: Mapping[str, EvaluationResult] = field(default_factory=dict)
    """The result of each named evaluation set, of which this one is the mean over all tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_row(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        return self._row("")

    def _row(self, name: str) -> dict[str, Any]:
        """`name`: empty, or `/` and the name of the set."""
        row = {f"eval_loss{name}": self.loss, f"eval_perplexity{name}": self.perplexity,
               f"eval_tokens{name}": self.tokens}  # fmt: skip
        row |= {f"eval_loss{name}/{source}": loss for source, loss in self.sources.items()}
        for inner, result in self.sets.items():
            row |= result._row(f"/{inner}")
        return row

    def __str__(self) -> str:
        text = f"eval loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, {self.tokens} tokens"
        losses = {**self.sources, **{name: one.loss for name, one in self.sets.items()}}
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        return f"{text} ({each})" if each else text


def evaluate_sets(
    model: BuiltModel, sets: Sequence[EvaluationSet], world: World
) -> EvaluationResult:
    """The result over all target tokens of `sets`, with that of each where they are named."""
    results = [evaluate(model, data.batches(), world, data.sources) for data in sets]
    if len(sets) == 1 and not sets[0].name:
        return results[0]
    tokens = sum(result.tokens for result in results)
    loss = sum(result.loss * result.tokens for result in results) / max(tokens, 1)
    named = {data.name: result for data, result in zip(sets, results, strict=True)}
    return EvaluationResult(loss, tokens, sets=named)


@torch.no_grad()
def evaluate(
    model: BuiltModel, batches: Iterable[Batch], world: World, sources: Sequence[str] = ()
) -> EvaluationResult:
    """Token-weighted loss over the batches of all ranks, equally many on each. `sources`: the names
    of those in the batches; their losses are computed too."""
    was_training = model.parts.training
    model.parts.train(False)
    total = torch.zeros(2, max(len(sources), 1), dtype=torch.float64, device=world.device)
    for batch in batches:
        rows = model.batch_sharder(batch)
        total[0] += model.compute.evaluate(rows)
        total[1] += _targets(rows) * int(model.batch_sharder.counts)
    model.parts.train(was_training)
    loss_sums, tokens = world.sum(total).tolist()
    found = zip(sources, loss_sums, tokens, strict=False)
    return EvaluationResult(
        sum(loss_sums) / max(sum(tokens), 1), int(sum(tokens)),
        {name: loss_sum / count for name, loss_sum, count in found if count},
    )  # fmt: skip


def _targets(rows: MicroBatch) -> torch.Tensor:
    """Target tokens of a batch: a scalar, or of each source."""
    is_target = rows.labels != IGNORED_LABEL
    return is_target.sum() if rows.sources is None else by_source(is_target.sum(1), rows.sources)


def is_evaluation_due(run: TrainRun, records: Sequence[StepRecord]) -> bool:
    """EvalCallBack: whether one of the steps just done is followed by an evaluation."""
    by_step, by_epoch = run.config.eval_step_interval, run.config.eval_epoch_interval
    return any(
        (by_step > 0 and record.step % by_step == 0)
        or (
            by_epoch > 0
            and record.step_in_epoch == run.steps_per_epoch
            and record.epoch % by_epoch == 0
        )
        for record in records
    )
