"""Evaluation: the loss per target token and the perplexity over a data set, and when it is due."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.data.loader import Batch
from launcher.parallel.world import World
from launcher.train.loss import IGNORED_LABEL

if TYPE_CHECKING:
    from launcher.train.run import BuiltModel, TrainRun
    from launcher.train.step import StepRecord


@dataclass(frozen=True)
class EvaluationResult:
    """`loss` in nats per target token, over `tokens` of them."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_row(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        return {"eval_loss": self.loss, "eval_perplexity": self.perplexity,
                "eval_tokens": self.tokens}  # fmt: skip

    def __str__(self) -> str:
        return f"eval loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, {self.tokens} tokens"


@torch.no_grad()
def evaluate(model: BuiltModel, batches: Iterable[Batch], world: World) -> EvaluationResult:
    """Token-weighted loss over the batches of all ranks, equally many on each."""
    was_training = model.parts.training
    model.parts.train(False)
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        rows = model.batch_sharder(batch)
        total[0] += model.compute.evaluate(rows)
        total[1] += (rows.labels != IGNORED_LABEL).sum() * int(model.batch_sharder.counts)
    model.parts.train(was_training)
    loss_sum, tokens = world.sum(total).tolist()
    return EvaluationResult(loss_sum / max(tokens, 1), int(tokens))


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
