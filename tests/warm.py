"""What the fork server of `tests.ranks` imports and computes once, before it forks any rank.

Importing this module is the work: it is the last entry of the server's preload list.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io

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
]  # fmt: skip


def _draw_once() -> None:
    """Fonts, ticks and image plugins of matplotlib are loaded when the first figure is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots().plot([1, 2], label="line")
    figure.axes[0].legend()
    figure.savefig(io.BytesIO(), format="png")


for _name in _MODULES:
    with contextlib.suppress(ImportError):  # a module of another version of a library
        importlib.import_module(_name)
_draw_once()
# What was made so far lives as long as the server. Without this every full collection in a rank
# walks it (a quarter of a second), and writes to, thus copies, each of its pages.
gc.collect()
gc.freeze()
