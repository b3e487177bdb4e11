"""Evaluation: the loss per target token and the perplexity over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.data.loader import Batch
from launcher.parallel.world import World
from launcher.train.loss import IGNORED_LABEL, token_loss_sum


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
def evaluate(model: nn.Module, batches: Iterable[Batch], world: World) -> EvaluationResult:
    """Token-weighted loss over the batches of all ranks; each rank brings equally many."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        logits = model(
            batch.input_ids.to(world.device),
            position_ids=None
            if batch.position_ids is None
            else batch.position_ids.to(world.device),
            document_ids=None
            if batch.document_ids is None
            else batch.document_ids.to(world.device),
        )
        total[0] += token_loss_sum(logits, batch.labels.to(world.device)).item()
        total[1] += (batch.labels != IGNORED_LABEL).sum().item()
    model.train(was_training)
    loss_sum, tokens = world.sum(total).tolist()
    return EvaluationResult(loss_sum / max(tokens, 1), int(tokens))
