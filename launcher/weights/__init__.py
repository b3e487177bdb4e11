"""Weights: what is on disk becomes what each rank needs, and back, box by box.

Rooms, each on those before it: `formats`, `source` (what is on disk) with `pieces` and `links`,
`reading` (into memory), `streaming` (from disk to disk), `ranks` (rank files), `offline` (tools).

The Python calls of the original are here under its names, those of the tools under theirs; each is
imported when it is asked for, so that one that reads files does not load torch:

    unified_safetensors(mindspore_ckpt_dir, output_dir, ...)      rank files to complete weights
    load_distributed_checkpoint(predict_strategy=, ...)           complete weights to rank files
    merge_pipeline_strategys(src_strategy_dirs, dst_strategy_file)
    ckpt_to_safetensors(file_path, save_path, ...)                files of torch to safetensors
    verify(path)                                                  what is damaged
    list_checkpoints(path)                                        the saves there are
    diff(a, b)                                                    what is different
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

CALLS = {
    "unified_safetensors": "launcher.weights.offline.merge",
    "load_distributed_checkpoint": "launcher.weights.offline.slicing",
    "merge_pipeline_strategys": "launcher.mindspore.strategy_files",
    "ckpt_to_safetensors": "launcher.weights.offline.convert",
    "verify": "launcher.weights.offline.inspection",
    "list_checkpoints": "launcher.weights.offline.listing",
    "diff": "launcher.weights.offline.compare",
}
"""Call to the module it lives in."""


def __getattr__(name: str) -> Any:
    if name in CALLS:
        return getattr(import_module(CALLS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
