"""The loss: summed over tokens here, divided by the tokens of the whole global batch elsewhere.

A sum, not a mean: micro-batches and ranks with different numbers of target tokens then weigh as
many tokens as they have, whatever the padding, accumulation or number of ranks.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

IGNORED_LABEL = -100


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, summed over the labels that are not -100. A float32 scalar.

    logits: [batch, sequence, vocabulary], any floating dtype; labels: [batch, sequence] int64,
    already shifted (`labels[b, t]` is the token after position t).
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL
    )
