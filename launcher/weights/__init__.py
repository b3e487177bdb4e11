"""Weights: from files on disk to the part of them that each rank holds, and back.

Packages, each built on those before it: `formats` (one file), `source` (a checkpoint), `reading`
(into memory), `streaming` (from disk to disk), `ranks` (rank files), `adapters`, `offline` (tools).

The functions of the tools can be called from Python under the names of the commands, and those
that MindSpore has under its names. Each is imported at its first use, so that reading files does
not load torch:

    unified_safetensors(mindspore_ckpt_dir, output_dir, ...)      rank files to complete weights
    load_distributed_checkpoint(predict_strategy=, ...)           complete weights to rank files
    merge_pipeline_strategys(src_strategy_dirs, dst_strategy_file)
    ckpt_to_safetensors(file_path, save_path, ...)       files of torch or MindSpore to safetensors
    safetensors_to_ckpt(file_path, save_path, ...)       and back, to files of MindSpore
    verify(path)                                                  checks all files
    list_checkpoints(path)                                        the saves in a folder
    export_directory(path, output_dir, ...)                       a complete Hugging Face directory
    export_adapter(path, output_dir, ...)                         an adapter as PEFT opens it
    merge_adapter(path, output_dir, base=, ...)                   a model with its adapter merged in
    diff(a, b)                                                    tensors that differ
"""

from __future__ import annotations

from typing import Any

from launcher.extensions import PYTHON_CALLS, required


def __getattr__(name: str) -> Any:
    if name in PYTHON_CALLS:
        return required(PYTHON_CALLS, name, f"launcher.weights.{name} needs an extension")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
