"""Whole or not: the rank files of one save, checked by all ranks together.

Owns what makes a file count: it is there, it has the size and the header its manifest gives, and,
before a run is resumed, its bytes have their checksums (weights alone are checked as they are
loaded: `launcher.weights.reading.recheck`). Each rank takes its share of the files, all hear the
same. A file that does not count is as good as missing: where the files of other ranks hold all that
it held, they stand in for it, and that is said. Of a save whose files lie on several disks each is
checked where it lies, and none stands in for another: a rank might not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.file_visibility import broadcast_headers, visibility_of
from launcher.checkpoint.folder import Folder
from launcher.checkpoint.published import Published
from launcher.errors import UserError
from launcher.parallel.all_ranks import on_all_ranks
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.manifests import MANIFEST_FOLDER
from launcher.weights.reading.checksums import file_faults
from launcher.weights.reading.local_files import with_local_files
from launcher.weights.source import Source

FAULTS_SHOWN = 3
"""Faults told of one save."""


Log = Callable[[str], None]
OpenFiles = Callable[[Path, Sequence[Path]], Source]
"""Makes a source of the rank files of one save."""


@dataclass(frozen=True)
class RankFile:
    """A rank file and what a manifest says of it, where there is one."""

    path: Path
    nbytes: int | None = None
    header_digest: str | None = None


@dataclass(frozen=True)
class Found:
    """What the files of a save amount to."""

    source: Source | None
    """Of the files that count; None where they do not hold everything."""
    faults: Sequence[str] = ()
    """What is wrong with the files that do not."""
    error: UserError | None = None
    """Why the files that count are no source."""

    def report(self, log: Log) -> None:
        """Say what is wrong with the files of a source that does without them."""
        for line in (*self.faults[:FAULTS_SHOWN], *(self.source.remarks if self.source else ())):
            log(line)


def latest_valid(
    candidates: Sequence[Published], world: World, log: Log,
    lacks: Callable[[Published], str] = lambda candidate: "", *, data: bool = True,
    filesystems: FilesystemGroups = ONE_FILESYSTEM,
) -> tuple[Published, Source]:  # fmt: skip
    """The last of `candidates` that is whole, and its source; those passed over are named.

    `lacks` says what else keeps one from being used; `data` is that of `whole_source`, `disks` are
    those of ranks that see the same. Raises `UserError` when none can be.
    """
    for candidate in reversed(candidates):
        files, there = (
            rank_files_of(candidate),
            filesystems if candidate.is_spread else ONE_FILESYSTEM,
        )
        found = open_valid_ranks(candidate.root, files, world, data=data, filesystems=there)
        lack = next(filter(None, world.gather(lacks(candidate))), "")
        if found.source is not None and not lack:
            found.report(log)
            return candidate, found.source
        reasons = [*found.faults[:FAULTS_SHOWN], lack or str(found.error or "")]
        log(f"passed over {candidate.name}: {'; '.join(filter(None, reasons))}")
    raise no_valid_save(candidates[-1].root, len(candidates))


def no_valid_save(root: Path, tried: int) -> UserError:
    """What to say when all checkpoints of a folder were passed over."""
    return UserError(
        f"no checkpoint in {root} can be used",
        rule=f"{tried} were tried, see above",
        advice="Give another folder as load_checkpoint, or start again without resume_training",
    )


def warn_skipped(folder: Folder, world: World, log: Log) -> list[Path]:
    """Say which saves of `folder` do not count. Returns the manifests that are damaged."""
    for half in folder.partial_saves:
        log(str(half))
    known = {candidate.name.record for candidate in folder.candidates}
    known |= {half.record for half in folder.partial_saves}
    found = (folder.root / MANIFEST_FOLDER).glob("*.json")
    damaged: list[Path] = world.from_main(sorted(path for path in found if path.name not in known))
    for path in damaged:
        log(f"passed over {path.stem}: {path} is damaged")
    return damaged


def rank_files_of(candidate: Published) -> list[RankFile]:
    """The rank files of a checkpoint, with what its manifest says of them."""
    return [
        RankFile(path, record["bytes"], record.get("header_xxh3_64"))
        for path, record in zip(candidate.files, candidate.manifest["files"], strict=True)
    ]


def open_valid_ranks(
    root: Path,
    files: Sequence[RankFile],
    world: World,
    open_files: OpenFiles = open_rank_files,
    *,
    data: bool = True,
    filesystems: FilesystemGroups = ONE_FILESYSTEM,
) -> Found:
    """The source in `root` made of those `files` that are whole, and what is wrong with the others.

    Called by all ranks together. `open_files` makes a source of files. `data` False does not read
    what is behind the headers. `disks`: which ranks see the same files, where not all do.
    """
    paths = [file.path for file in files]
    visibility = visibility_of(paths, filesystems, world)
    mine = {index: _faults(files[index], data) for index in visibility.share}
    by_index = {index: found for part in world.gather(mine) for index, found in part.items()}
    faults = [text for index in sorted(by_index) for text in by_index[index]]
    whole = [file.path for index, file in enumerate(files) if not by_index[index]]
    if not whole or (faults and visibility.hidden):
        return Found(None, faults)
    try:
        reported = broadcast_headers(paths, visibility, world) if visibility.hidden else {}
        source = on_all_ranks(
            world,
            lambda: (
                with_local_files(open_rank_files(root, whole, reported), reported)
                if visibility.hidden
                else open_files(root, whole)
            ),
        )
    except UserError as error:
        return Found(None, faults, error)
    return Found(source, faults)


def _faults(file: RankFile, data: bool) -> list[str]:
    if not file.path.is_file():
        return [f"{file.path} is missing"]
    found = file.path.stat().st_size
    if file.nbytes is not None and found != file.nbytes:
        return [f"{file.path} has {found} bytes instead of {file.nbytes}"]
    return file_faults(file.path, header_digest=file.header_digest, data=data)
