"""Validation: the rank files of one save, checked by all ranks together.

A file is valid when it has the size and the header of its manifest and, before a resume, the right
checksums (for weights alone they are checked during loading: `launcher.weights.reading.recheck`).
Each rank checks its share of the files, and all get the same result. An invalid file is treated as
missing: where files of other ranks have all of its tensors, they replace it, and that is logged.
Files of a save on several file systems are checked where they are, and never replaced: not every
rank could read the replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.catalog import Published, RankFile, damaged_manifests
from launcher.checkpoint.file_visibility import broadcast_headers, visibility_of
from launcher.checkpoint.folder import Folder
from launcher.errors import UserError
from launcher.parallel.all_ranks import on_all_ranks
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.formats.safetensors import Header
from launcher.weights.log import Log
from launcher.weights.ranks.distributed import OpenFiles, open_rank_files
from launcher.weights.reading.local_files import with_local_files
from launcher.weights.source import Source

FAULTS_SHOWN = 3
"""Faults logged for one save."""


@dataclass(frozen=True)
class Found:
    """The result of checking the files of a save."""

    source: Source | None
    """Of the valid files; None where they do not have everything."""
    faults: Sequence[str] = ()
    """What is wrong with the other files."""
    error: UserError | None = None
    """Why the valid files could not be opened."""

    def report(self, log: Log) -> None:
        """Log what is wrong with the files that were replaced by others."""
        for line in (*self.faults[:FAULTS_SHOWN], *(self.source.remarks if self.source else ())):
            log(line)


def latest_valid(
    candidates: Sequence[Published], world: World, log: Log,
    lacks: Callable[[Published], str] = lambda candidate: "", *, data: bool = True,
    filesystems: FilesystemGroups = ONE_FILESYSTEM,
) -> tuple[Published, Source]:  # fmt: skip
    """The last valid save of `candidates`, and its source; skipped saves are logged.

    `lacks` may give another reason to skip one; for `data` and `filesystems` see
    `open_valid_ranks`. Raises `UserError` when all are skipped.
    """
    for candidate in reversed(candidates):
        used = filesystems if candidate.is_spread else ONE_FILESYSTEM
        found = open_valid_ranks(
            candidate.root, candidate.rank_files, world, data=data, filesystems=used
        )
        lack = next(filter(None, world.gather(lacks(candidate))), "")
        if found.source is not None and not lack:
            found.report(log)
            return candidate, found.source
        reasons = [*found.faults[:FAULTS_SHOWN], lack or str(found.error or "")]
        log(f"skipped {candidate.name}: {'; '.join(filter(None, reasons))}")
    raise no_valid_save(candidates[-1].root, len(candidates))


def no_valid_save(root: Path, tried: int) -> UserError:
    """The error when all saves of a folder were skipped."""
    return UserError(
        f"no checkpoint in {root} can be used",
        rule=f"all {tried} were skipped, see above",
        advice="Give another folder as load_checkpoint, or start again without resume_training",
    )


def warn_skipped(folder: Folder, world: World, log: Log) -> list[Path]:
    """Log the partial and damaged saves of `folder`. Returns the damaged manifests."""
    for save in folder.partial_saves:
        log(str(save))
    known = {candidate.name.record for candidate in folder.candidates}
    known |= {save.record for save in folder.partial_saves}
    damaged: list[Path] = world.from_main(damaged_manifests(folder.root, known))
    for path in damaged:
        log(f"skipped {path.stem}: {path} is damaged")
    return damaged


def open_valid_ranks(
    root: Path,
    files: Sequence[RankFile],
    world: World,
    open_files: OpenFiles = open_rank_files,
    *,
    data: bool = True,
    filesystems: FilesystemGroups = ONE_FILESYSTEM,
) -> Found:
    """Check `files` in `root`, and open those that are valid as one source.

    Called by all ranks together. `data` False checks sizes and headers only. `filesystems`: the
    ranks that share the files, where not all do.
    """
    paths = [file.path for file in files]
    visibility = visibility_of(paths, filesystems, world)
    mine = {index: files[index].faults(data=data) for index in visibility.share}
    by_index = {index: found for part in world.gather(mine) for index, found in part.items()}
    faults = [text for index in sorted(by_index) for text in by_index[index]]
    valid = [path for index, path in enumerate(paths) if not by_index[index]]
    if not valid or (faults and visibility.hidden):
        return Found(None, faults)
    try:
        if not visibility.hidden:
            return Found(on_all_ranks(world, open_files, root, valid), faults)
        headers = broadcast_headers(paths, visibility, world)
        return Found(on_all_ranks(world, _open_spread, root, valid, headers), faults)
    except UserError as error:
        return Found(None, faults, error)


def _open_spread(root: Path, files: Sequence[Path], headers: Mapping[Path, Header]) -> Source:
    """Open files on several file systems; `headers` of those that this rank cannot read."""
    return with_local_files(open_rank_files(root, files, headers), headers)
