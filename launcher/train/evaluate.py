"""Evaluation: the loss per target token and the perplexity over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from launcher.data.loader import Batch
from launcher.parallel.parts import Parts
from launcher.parallel.world import World
from launcher.train.compute import BatchSharder, Compute
from launcher.train.loss import IGNORED_LABEL


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
def evaluate(
    parts: Parts,
    compute: Compute,
    batch_sharder: BatchSharder,
    batches: Iterable[Batch],
    world: World,
) -> EvaluationResult:
    """Token-weighted loss over the batches of all ranks; each rank brings equally many."""
    was_training = parts.training
    parts.train(False)
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        rows = batch_sharder(batch)
        total[0] += compute.evaluate(rows)
        total[1] += (rows.labels != IGNORED_LABEL).sum() * int(batch_sharder.counts)
    parts.train(was_training)
    loss_sum, tokens = world.sum(total).tolist()
    return EvaluationResult(loss_sum / max(tokens, 1), int(tokens))
