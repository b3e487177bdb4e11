"""What the fork server of `tests.ranks` imports and computes once, before it forks any rank.

Importing this module is the work: it is the last entry of the server's preload list.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.report.curves import draw_loss
from launcher.train import reporting

_MODULES = [
    "torch", "torch._dynamo", "torch._dynamo.backends.debugging", "networkx",
    "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.profiler._cupti_monitor", "numpy",
    "transformers", "transformers.models.auto", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.generation.logits_process",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
    "hydra.core.override_parser.overrides_parser",
    "launcher.config.printing", "launcher.config.resolve", "launcher.config.rules",
    "launcher.modes", "launcher.cli", "launcher.tools.unified_safetensors",
    "pytest", "safetensors.torch", "tests.ranks", "tests.workshop", "tests.models.tiny",
]  # fmt: skip


def _draw_nothing(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """In place of `draw_loss`, a third of the work of a small run."""
    if not any(row.get("loss") is not None for row in rows):
        return False
    path.write_bytes(b"")
    return True


def draw_for_real() -> None:
    """Runs of this process draw their loss curve, which those of the server do not."""
    reporting.draw_loss = draw_loss


for _name in _MODULES:
    with contextlib.suppress(ImportError):  # a module of another version of a library
        importlib.import_module(_name)
reporting.draw_loss = _draw_nothing
# What was made so far lives as long as the server. Without this every full collection in a rank
# walks it (a quarter of a second), and writes to, thus copies, each of its pages.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)
