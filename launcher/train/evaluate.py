"""Evaluation: the loss per target token and the perplexity over data sets, and when it is due.

Invariant: results are sums over all ranks, so that every rank has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from launcher.data.loader import Batch
from launcher.data.rows import RowDataset
from launcher.host_reads import host_read
from launcher.parallel.world import World
from launcher.train.compute import MicroBatch, by_source
from launcher.train.loss import IGNORED_LABEL
from launcher.train.preference import summary_of

if TYPE_CHECKING:
    from launcher.train.preference_task import PreferenceTask
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
    dataset: RowDataset | None = None
    """The rows of the batches of all ranks; None where nobody asks for them."""
    reference: torch.Tensor | None = None
    """Of preferences: as that of `TrainRun`, for the rows of this data."""


@dataclass(frozen=True)
class EvaluationResult:
    """`loss` in nats per target token, over `tokens` of them; of preferences the loss of a sample,
    over `tokens` samples."""

    loss: float
    tokens: int
    sources: Mapping[str, float] = field(default_factory=dict)
    """The loss of each source of a mixture that has target tokens."""
    sets: Mapping[str, EvaluationResult] = field(default_factory=dict)
    """The result of each named evaluation set, of which this one is the mean over all tokens."""
    preference: Mapping[str, float] | None = None
    """Rewards and log-probabilities, by the names of TRL; None for the loss on tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_row(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        return self._row("")

    def _row(self, name: str) -> dict[str, Any]:
        """`name`: empty, or `/` and the name of the set."""
        row: dict[str, Any] = {f"eval_loss{name}": self.loss}
        if self.preference is None:
            row |= {f"eval_perplexity{name}": self.perplexity, f"eval_tokens{name}": self.tokens}
        else:
            row[f"eval_samples{name}"] = self.tokens
            row |= {f"eval_{metric}{name}": value for metric, value in self.preference.items()}
        row |= {f"eval_loss{name}/{source}": loss for source, loss in self.sources.items()}
        for inner, result in self.sets.items():
            row |= result._row(f"/{inner}")
        return row

    def __str__(self) -> str:
        text = f"eval loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, {self.tokens} tokens"
        if self.preference is not None:
            shown = (f", {name} {value:.4f}" for name, value in self.preference.items())
            text = f"eval loss {self.loss:.4f}{''.join(shown)}, {self.tokens} samples"
        losses = {**self.sources, **{name: one.loss for name, one in self.sets.items()}}
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        return f"{text} ({each})" if each else text


def evaluate_sets(
    model: BuiltModel, sets: Sequence[EvaluationSet], world: World
) -> EvaluationResult:
    """The result over all target tokens of `sets`, with that of each where they are named."""
    results = [_evaluate_set(model, data, world) for data in sets]
    if len(sets) == 1 and not sets[0].name:
        return results[0]
    tokens = sum(result.tokens for result in results)
    loss = sum(result.loss * result.tokens for result in results) / max(tokens, 1)
    named = {data.name: result for data, result in zip(sets, results, strict=True)}
    return EvaluationResult(
        loss, tokens, sets=named, preference=None if model.preference is None else {}
    )


def _evaluate_set(model: BuiltModel, data: EvaluationSet, world: World) -> EvaluationResult:
    if model.preference is None:
        return evaluate(model, data.batches(), world, data.sources)
    return _evaluate_preferences(model, model.preference, data, world)


@torch.no_grad()
def _evaluate_preferences(
    model: BuiltModel, task: PreferenceTask, data: EvaluationSet, world: World
) -> EvaluationResult:
    """The mean over samples. The divergence of kto is that over all of the data, in a pass of its
    own."""
    was_training = model.parts.training
    model.parts.train(False)
    divergence = None
    if not task.settings.is_paired:
        divergence = task.divergence_of_data(model, world, data.batches(), data.reference)
    shape = (max(len(data.sources), 1), 2 + len(task.settings.measures))
    total = torch.zeros(shape, dtype=torch.float64, device=world.device)
    for batch in data.batches():
        part = task.prepared(model, batch, data.reference)
        rows = replace(model.batch_sharder(part.batch), given=part.given(divergence))
        total += model.compute.evaluate(rows)
    model.parts.train(was_training)
    model.parts.free_gathered()
    with host_read("evaluation"):
        table = world.sum(total).cpu()
    loss, samples, *measures = table.sum(0).tolist()
    each = zip(data.sources, table[:, :2].tolist(), strict=False)
    return EvaluationResult(
        loss / max(samples, 1), int(samples),
        {name: part / count for name, (part, count) in each if count},
        preference=summary_of(task.settings, measures, samples),
    )  # fmt: skip


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
    model.parts.free_gathered()
    with host_read("evaluation"):
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
