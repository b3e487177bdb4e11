"""Strategy files of a job: MindSpore's record of how its tensors are cut, a file a rank.

Owns what is in them and where they are written: `{output_dir}/strategy`, each aside and renamed.
Invariants: names are those of rank files; all ranks of a pipeline stage write the same bytes; what
the format cannot say is left out, and told in one line. Neither device nor process group is needed:
one process can write the files of any number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launcher.assembly.job import Job
from launcher.assembly.layout import model_layout
from launcher.checkpoint.files import temporary
from launcher.config.derived import world_size
from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.layout.grid import TensorLayout, entry
from launcher.layout.layout import Layout, Placement
from launcher.layout.strategy import parse, serialise, strategy_file
from launcher.parallel.world import World
from launcher.weights.source import OPTIMIZER_PREFIXES
from models.build import build_model
from models.names import unstacked

PREFIX, SUFFIX = "ckpt_strategy_rank_", ".ckpt"


@dataclass(frozen=True)
class StageFiles:
    """The content of the files of every pipeline stage."""

    stages: tuple[bytes, ...]
    left_out: tuple[str, ...]
    """Tensors the format cannot say, of any stage."""
    tensors: int
    """All there are."""

    def of(self, rank: int, layout: Layout) -> bytes:
        """The file of `rank`."""
        return self.stages[layout.mesh.coordinates(rank)["pp"]]


def world_without_group() -> World:
    """This process by its environment alone, on the CPU: nobody is waited for."""
    return World(int(os.environ.get("RANK", 0)), world_size(), torch.device("cpu"))


def write_all(job: Job) -> None:
    """Write the files of the configured layout: of all ranks in one process, of this rank in a
    launched job. Raises `UserError`."""
    model = build_model(job.spec, dtype=torch.float32)
    layout = model_layout(
        model, job.spec, job.mesh, split=job.split,
        vocab_emb_dp=job.config.parallel_config.vocab_emb_dp,
    )  # fmt: skip
    ranks = range(layout.mesh.world_size) if job.world.size == 1 else (job.world.rank,)
    files = _write(job, layout, ranks)
    stages = len(files.stages)
    whose = "" if job.world.size == 1 else ", one by each process"
    job.say(
        f"strategy: {_count(layout.mesh.world_size, 'file')} of {_count(stages, 'stage')} written "
        f"to {_folder(job)}{whose}"
    )


def write_own(job: Job, layout: Layout) -> None:
    """Write this rank's file. Raises `UserError`."""
    _write(job, layout, (job.world.rank,))


def stage_files(layout: Layout) -> StageFiles:
    """What the files of every stage say, with the state of the optimizer."""
    stages, left_out, tensors = [], dict[str, None](), dict[str, None]()
    for stage in range(layout.mesh.pp):
        found = dict(_entries(layout, stage))
        tensors |= dict.fromkeys(found)
        left_out |= {name: None for name, made in found.items() if made is None}
        stages.append(_file(layout, stage, {n: made for n, made in found.items() if made}))
    return StageFiles(tuple(stages), tuple(left_out), len(tensors))


def _entries(layout: Layout, stage: int) -> Iterator[tuple[str, TensorLayout | None]]:
    """(name in rank files, layout) of each tensor of a stage; None where the format has none.

    The cuts are the same on all ranks of a stage, so its first rank tells.
    """
    mesh = layout.mesh
    for name, placement in layout.of(stage * mesh.world_size // mesh.pp).items():
        experts = unstacked(name, placement.shape)
        made = _of_an_expert(placement, layout) if experts else _of(placement, layout)
        for file_name in experts or (name,):
            # In the format a hyphen ends the number of the stage.
            yield file_name, None if "-" in file_name else made


def _of(placement: Placement, layout: Layout) -> TensorLayout | None:
    return entry(placement.shape, placement.cuts, layout.mesh.sizes())


def _of_an_expert(placement: Placement, layout: Layout) -> TensorLayout | None:
    """The layout of every tensor of a stack; None where a rank holds some of them only, which the
    format cannot say."""
    if any(dim == 0 for _, dim in placement.cuts):
        return None
    shape: Shape = placement.shape[1:]
    return entry(shape, [(axis, dim - 1) for axis, dim in placement.cuts], layout.mesh.sizes())


def _file(layout: Layout, stage: int, entries: Mapping[str, TensorLayout]) -> bytes:
    data = strategy_file(entries, stage, prefixes=OPTIMIZER_PREFIXES)
    buffers = [name for name in entries if not layout.cut(name).sharded]
    if not buffers:
        return data
    stateless = {prefix + name for name in buffers for prefix in OPTIMIZER_PREFIXES}
    content = parse(data, f"stage {stage}")
    kept = tuple(item for item in content.layouts if item[0] not in stateless)
    return serialise(replace(content, layouts=kept))


def _write(job: Job, layout: Layout, ranks: range | tuple[int, ...]) -> StageFiles:
    files, folder = stage_files(layout), _folder(job)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank in ranks:
            path = folder / f"{PREFIX}{rank}{SUFFIX}"
            scratch = temporary(path)
            try:
                scratch.write_bytes(files.of(rank, layout))
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
        job.say(
            f"warning: the strategy files leave out {len(files.left_out)} of {files.tensors} "
            f"tensors, such as {files.left_out[0]}: the format knows neither pieces of unequal "
            "size nor experts that only some ranks hold"
        )
    names = {f"{PREFIX}{rank}{SUFFIX}" for rank in range(layout.mesh.world_size)}
    others = [path for path in _folder(job).glob(f"{PREFIX}*{SUFFIX}") if path.name not in names]
    if others:
        job.say(
            f"warning: {_folder(job)} holds {_count(len(others), 'file')} of another run, such as "
            f"{min(others).name}: move them away before the strategies are merged"
        )


def _folder(job: Job) -> Path:
    return job.output_dir / "strategy"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
