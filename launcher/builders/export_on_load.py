"""Copies of the weights that a job loads: merged, or in MindSpore's form.

Owns {output_dir}/unified_checkpoint and {output_dir}/ms_safetensors. Each rank writes a part of a
folder with a temporary name; rank 0 renames it when it is complete. Invariants: only an earlier
copy is replaced, and what is loaded is never written to. Optimizer state is not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from launcher.builders.job import Job
from launcher.errors import UserError
from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.world import World
from launcher.weights.forms import has_form
from launcher.weights.joined import together
from launcher.weights.offline.copy_record import FOLDERS, foreign, write_record
from launcher.weights.offline.export import write_complete
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.ranks.saves import copy_model_files
from launcher.weights.reading.tensor_bytes import TORCH_DTYPES
from launcher.weights.source import Source
from launcher.weights.streaming.new_folder import folder_aside
from models.lora_config import is_adapter

Result = TypeVar("Result")


def export_on_load(job: Job, source: Source) -> None:
    """Write the configured copies of `source`. Called on every rank; raises `UserError` on every
    rank when one could not write."""
    config, distributed = job.config, source.kind == "distributed"
    if any(map(is_adapter, source.tensors)):
        for key in (key for key in FOLDERS if getattr(config, key)):
            job.log(f"{key}: no effect, {source.path} holds an adapter (see launcher.tools."
                    "merge_lora)")  # fmt: skip
        return
    if config.save_unified_checkpoint and source.is_spread:
        raise UserError(
            f"save_unified_checkpoint: True: no rank can access all files of {source.path}",
            rule="complete weights are merged from the files of all ranks",
            advice="Put the folders of checkpoints together on a disk that all machines share",
        )
    if config.save_unified_checkpoint and distributed:
        _write(job, source, "save_unified_checkpoint", "huggingface")
    if config.save_converted_checkpoint and not distributed:
        metadata = (header.metadata for header in source.headers.values())
        if not has_form("mindspore", source.index, metadata):
            _write(job, source, "save_converted_checkpoint", "mindspore")


def _write(job: Job, source: Source, key: str, form: str) -> None:
    target, world = job.output_dir / FOLDERS[key], job.world
    with ExitStack() as stack:
        begin = lambda: _begin(stack, target, source, key)  # noqa: E731
        scratch = _together(world, begin if world.is_main else lambda: None)[0]
        assert scratch is not None
        share = lambda: write_complete(  # noqa: E731
            together(source, job.spec.hf_config),
            scratch,
            keep=lambda name: not is_optimizer_state(name),
            form=form,
            share=(world.rank, world.size),
        )
        written = _together(world, share)[0]

        def finish() -> None:
            if form == "huggingface":
                _write_model_files(job, source, scratch)
            write_record(scratch, key)
            stack.close()  # renames it

        _together(world, finish if world.is_main else lambda: None)
    job.log(f"{key}: {written.tensors} tensors, {written.total_bytes / 1e6:.1f} MB in {target}")


def _begin(stack: ExitStack, target: Path, source: Source, key: str) -> Path:
    """The folder to write into, which becomes `target` when `stack` is closed."""
    reason = foreign(target, key)
    if reason:
        raise UserError(
            reason,
            rule=f"{key}: only a copy of an earlier run is replaced",
            advice="Move it away, or give another output_dir",
        )
    return stack.enter_context(
        folder_aside(target, source.path, overwrite=True, owned=True, option="output_dir")
    )


def _together(world: World, action: Callable[[], Result]) -> list[Result]:
    """The results of `action` on all ranks; an error of one is raised on all."""

    return raise_if_any_failed(
        world, capture_error(action), "the copy of the weights could not be written"
    )


def _write_model_files(job: Job, source: Source, folder: Path) -> None:
    """config.json and tokenizer: those saved beside the rank files, or else those of this run."""
    if copy_model_files(min(source.headers), folder):
        return
    dtypes = {name: source.dtype(name) for name in source.tensors}
    dtype = TORCH_DTYPES[next(iter(dtypes.values()))]
    for name, content in job.model_files(dtype).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
