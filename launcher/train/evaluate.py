"""Evaluation: the loss per target token and the perplexity over a data set, and when it is due."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from launcher.data.loader import Batch
from launcher.parallel.world import World
from launcher.train.compute import MicroBatch, by_source
from launcher.train.loss import IGNORED_LABEL
from launcher.train.preference import summary_of

if TYPE_CHECKING:
    from launcher.train.preference_task import PreferenceTask
    from launcher.train.run import BuiltModel, TrainRun
    from launcher.train.step import StepRecord


@dataclass(frozen=True)
class EvaluationData:
    """What a model is evaluated on."""

    batches: Callable[[], Iterable[Batch]]
    """This rank's share, equally many batches on every rank."""
    sources: tuple[str, ...] = ()
    """The names of the sources; none where the data is no mixture."""
    reference: torch.Tensor | None = None
    """Of preferences: as that of `TrainRun`, for the rows of this data."""


@dataclass(frozen=True)
class EvaluationResult:
    """`loss` in nats per target token, over `tokens` of them; of preferences per sample, over
    `samples` of them."""

    loss: float
    tokens: int
    sources: Mapping[str, float] = field(default_factory=dict)
    """The loss of each source of a mixture that has target tokens."""
    samples: int | None = None
    """Of preferences; None for the loss on tokens."""
    preference: Mapping[str, float] = field(default_factory=dict)
    """Rewards and log-probabilities, by the names of TRL."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_row(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        if self.samples is None:
            row = {"eval_loss": self.loss, "eval_perplexity": self.perplexity,
                   "eval_tokens": self.tokens}  # fmt: skip
        else:
            row = {"eval_loss": self.loss, "eval_samples": self.samples}
            row |= {f"eval_{name}": value for name, value in self.preference.items()}
        return row | {f"eval_loss/{name}": loss for name, loss in self.sources.items()}

    def __str__(self) -> str:
        text = f"eval loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, {self.tokens} tokens"
        if self.samples is not None:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in self.preference.items() if "rewards" in k)
            text = f"eval loss {self.loss:.4f}, {shown}, {self.samples} samples"
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in self.sources.items())
        return f"{text} ({each})" if each else text


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


def evaluate_data(model: BuiltModel, data: EvaluationData, world: World) -> EvaluationResult:
    """The loss over all of `data`: on tokens, or on preferences."""
    if model.preference is None:
        return evaluate(model, data.batches(), world, data.sources)
    return _evaluate_preferences(model, model.preference, data, world)


@torch.no_grad()
def _evaluate_preferences(
    model: BuiltModel, task: PreferenceTask, data: EvaluationData, world: World
) -> EvaluationResult:
    """The mean over samples. k of kto is that of all of the data: a pass of its own."""
    was_training = model.parts.training
    model.parts.train(False)
    total, divergence = None, None
    if not task.settings.is_paired:
        divergence = task.divergence_of_data(model, world, data.batches(), data.reference)
    for batch in data.batches():
        part = task.prepared(model, batch, data.reference)
        rows = replace(model.batch_sharder(part.batch), given=part.given(divergence))
        sums = model.compute.evaluate(rows).double()
        total = sums if total is None else total + sums
    model.parts.train(was_training)
    assert total is not None
    table = world.sum(total).cpu()
    loss, samples, *measures = table.sum(0).tolist()
    each = zip(data.sources, table[:, :2].tolist(), strict=False)
    return EvaluationResult(
        loss / max(samples, 1), 0, {name: part / n for name, (part, n) in each if n},
        samples=int(samples), preference=summary_of(task.settings, measures, samples),
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
