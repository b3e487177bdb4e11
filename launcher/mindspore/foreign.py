"""How weights under names of MindFormers are recognised where they could not be mapped."""

from __future__ import annotations

import re

from launcher.weights.reading.mismatch import Foreign

FOREIGN = (
    Foreign(
        re.compile(r"embedding_weight$|\.w_qkv\.|\.w_gate_hidden\.|\.tok_embeddings\."),
        "weights under names of MindFormers, for which this model has no parameter",
        "Give the config.json of these weights, or other weights",
    ),
)
