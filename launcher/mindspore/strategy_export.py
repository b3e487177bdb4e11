"""Strategy files of a job: MindSpore's record of how its tensors are sharded, one for each rank.

Owns their content and place: `{output_dir}/strategy`, each written under a temporary name and
renamed. Invariants: names are those of rank files; all ranks of a pipeline stage write the same
bytes; tensors that the format cannot express are left out, and reported in one line. Neither device
nor process group is needed: one process can write the files of any number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launcher.builders.job import Job
from launcher.builders.layout import model_layout
from launcher.checkpoint.files import temporary
from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.layout import Layout, Placement
from launcher.mindspore.rank_weights import holds_foreign
from launcher.mindspore.strategy import parse, serialize, strategy_file
from launcher.mindspore.tensor_layout import TensorLayout, entry
from launcher.report.aside import move_to_numbered_folder
from launcher.train.optimizer import state_names
from launcher.weights.optimizer_state import STATE_PREFIXES
from launcher.weights.tensor_mapping import MappingsOf, TensorMapping, shapes_in_files
from models.build import build_model, mappings_of
from models.trained import trained_parameters

PREFIX, SUFFIX = "ckpt_strategy_rank_", ".ckpt"


@dataclass(frozen=True)
class StageFiles:
    """The content of the files of every pipeline stage."""

    stages: tuple[bytes, ...]
    left_out: tuple[str, ...]
    """Tensors that the format cannot express, of any stage."""
    tensors: int
    """Number of all tensors."""

    def of(self, rank: int, layout: Layout) -> bytes:
        """The file of `rank`."""
        return self.stages[layout.mesh.coordinates(rank)["pp"]]


def write_all(job: Job) -> None:
    """Write the files of the configured layout: of all ranks in one process, of this rank in a
    launched job. Raises `UserError`."""
    model = build_model(job.spec, dtype=torch.float32)
    layout = model_layout(
        model, job.spec, job.mesh, split=job.split,
        vocab_emb_dp=job.config.parallel_config.vocab_emb_dp,
    )  # fmt: skip
    ranks = range(layout.mesh.world_size) if job.world.size == 1 else (job.world.rank,)
    states = state_names(job.config.optimizer, trained_parameters(model))
    files = _write(job, layout, mappings_of(model), states, ranks)
    stages = len(files.stages)
    whose = "" if job.world.size == 1 else ", one by each process"
    job.log(
        f"strategy: {_count(layout.mesh.world_size, 'file')} of {_count(stages, 'stage')} written "
        f"to {_folder(job)}{whose}"
    )


def write_own(
    job: Job, layout: Layout, mappings_of: MappingsOf, state_names: Mapping[str, tuple[str, ...]]
) -> None:
    """Write this rank's file, unless strategy files are there that rank files of MindSpore in the
    folder of checkpoints need. Raises `UserError`."""
    if job.world.from_main(_folder(job).is_dir() and holds_foreign(job.output_dir / "checkpoint")):
        job.log(
            f"strategy: not written, {_folder(job)} is needed by rank files beside it that Slipway "
            "did not write"
        )
        return
    _write(job, layout, mappings_of, state_names, (job.world.rank,))


def stage_files(
    layout: Layout, mappings_of: MappingsOf, state_names: Mapping[str, tuple[str, ...]]
) -> StageFiles:
    """The content of the files of every stage, with the state of the optimizer.

    `mappings_of`: what the tensors of the layout are in rank files. `state_names`: those that are
    trained, by name in the model, to the prefixes of their optimizer state.
    """
    states = {
        prefix + in_files
        for name, prefixes in state_names.items()
        for in_files in shapes_in_files({name: layout.shapes[name]}, mappings_of)
        for prefix in prefixes
    }
    stages, left_out, tensors = [], dict[str, None](), dict[str, None]()
    for stage in range(layout.mesh.pp):
        found = dict(_entries(layout, mappings_of, stage))
        tensors |= dict.fromkeys(found)
        left_out |= {name: None for name, made in found.items() if made is None}
        kept = {name: made for name, made in found.items() if made}
        stages.append(_file(kept, stage, states))
    return StageFiles(tuple(stages), tuple(left_out), len(tensors))


def _entries(
    layout: Layout, mappings_of: MappingsOf, stage: int
) -> Iterator[tuple[str, TensorLayout | None]]:
    """(name in rank files, layout) of each tensor of a stage; None where the format has none.

    All ranks of a stage are sharded alike, so the layout of its first rank is enough.
    """
    mesh = layout.mesh
    for name, placement in layout.of(stage * mesh.world_size // mesh.pp).items():
        mappings = mappings_of(name, placement.shape)
        if mappings is None:
            mappings = [TensorMapping(name, full_box(placement.shape))]
        for mapping in mappings:
            # In the format a hyphen ends the number of the stage.
            yield (
                mapping.name,
                None if "-" in mapping.name else _of(mapping, placement, mesh.sizes()),
            )


def _of(
    mapping: TensorMapping, placement: Placement, mesh: Mapping[str, int]
) -> TensorLayout | None:
    """The layout of a tensor of rank files; None where one rank holds all of it and another none,
    such as an expert, or a part of a fused projection that is split between parts."""
    parts = {d for d, n in enumerate(placement.shape) if mapping.box.size[d] != n}
    if any(dim in parts or dim in mapping.dropped for _, dim in placement.specs):
        return None
    kept = [dim for dim in range(len(placement.shape)) if dim not in mapping.dropped]
    return entry(mapping.shape, [(axis, kept.index(dim)) for axis, dim in placement.specs], mesh)


def _file(entries: Mapping[str, TensorLayout], stage: int, states: Collection[str]) -> bytes:
    """`states`: names of the optimizer state that there is."""
    prefixes = [p for p in STATE_PREFIXES if any(name.startswith(p) for name in states)]
    data = strategy_file(entries, stage, prefixes=prefixes)
    if all(prefix + name in states for name in entries for prefix in prefixes):
        return data
    content = parse(data, f"stage {stage}")
    kept = tuple(item for item in content.layouts if item[0] in states or item[0] in entries)
    return serialize(replace(content, layouts=kept))


def _write(
    job: Job,
    layout: Layout,
    mappings_of: MappingsOf,
    state_names: Mapping[str, tuple[str, ...]],
    ranks: range | tuple[int, ...],
) -> StageFiles:
    files, folder = stage_files(layout, mappings_of, state_names), _folder(job)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank in ranks:
            path = folder / f"{PREFIX}{rank}{SUFFIX}"
            scratch = temporary(path)
            content = files.of(rank, layout)
            try:
                scratch.write_bytes(content)
                if path.is_file() and path.read_bytes() != content:  # of an earlier run
                    move_to_numbered_folder(path)
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.filename} cannot be written",
            rule=str(error.strerror),
            advice="Set output_dir to a folder this run may write to",
        ) from error
    if job.world.is_main:
        _warn(job, layout, files)
    return files


def _warn(job: Job, layout: Layout, files: StageFiles) -> None:
    if files.left_out:
        job.log(
            f"warning: the strategy files leave out {len(files.left_out)} of {files.tensors} "
            f"tensors, such as {files.left_out[0]}: the format knows neither pieces of unequal "
            "size nor experts that only some ranks hold"
        )
    names = {f"{PREFIX}{rank}{SUFFIX}" for rank in range(layout.mesh.world_size)}
    others = [path for path in _folder(job).glob(f"{PREFIX}*{SUFFIX}") if path.name not in names]
    if others:
        job.log(
            f"warning: {_folder(job)} holds {_count(len(others), 'file')} of another run, such as "
            f"{min(others).name}: move them away before the strategies are merged"
        )


def _folder(job: Job) -> Path:
    return job.output_dir / "strategy"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
