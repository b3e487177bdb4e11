"""How weights under the names of MindFormers' own models are recognised."""

from __future__ import annotations

import re

from launcher.weights.reading.mismatch import Foreign

FOREIGN = (
    Foreign(
        re.compile(r"embedding_weight$|\.w_qkv\.|\.w_gate_hidden\."),
        "weights under the names of MindFormers' own models",
        "Give the Hugging Face weights of the model, or convert the names back with "
        "MindFormers' convert_weight.py --reversed",
    ),
)
