"""Which weights a path means, as all ranks agree on it.

Owns the policy around `launcher.weights`, which looks at one path in one process: all ranks must
find the same kind of weights, and an error of one rank is an error of all. Of rank files the newest
save is read, by its manifest, and where there is none by the numbers in file names. One rank file
selects its save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.catalog import RankFile, is_unfinished
from launcher.checkpoint.folder import Folder, scan
from launcher.checkpoint.names import rank_file_paths
from launcher.checkpoint.validation import (
    Found,
    latest_valid,
    no_valid_save,
    open_valid_ranks,
    warn_skipped,
)
from launcher.errors import Problem, UserError
from launcher.parallel.all_ranks import on_all_ranks
from launcher.parallel.consistency import Unquoted, check_same
from launcher.parallel.filesystems import ONE_FILESYSTEM
from launcher.parallel.world import World
from launcher.weights.log import Log
from launcher.weights.ranks.distributed import check_copies
from launcher.weights.ranks.manifests import MANIFEST_FOLDER
from launcher.weights.ranks.rank_folders import newest, save_of
from launcher.weights.ranks.saves import layout_mark, rank_file_opener
from launcher.weights.source import (
    Kind,
    Source,
    check_all_ranks,
    check_one_kind,
    detect,
    is_rank_folder,
    no_weights,
    open_complete,
)


def open_weights(path: Path, world: World, log: Log, *, strategy: str = "") -> Source:
    """The weights at `path`: complete, one file, or rank files. Called by all ranks together.

    `strategy`: path of the strategy files that some rank files need; left out, they are looked for
    in `strategy/` beside the folder of the rank folders. Raises `UserError`.
    """
    if _kind(path, world) == "distributed":
        return _open_rank_files(path, world, log, strategy)
    return open_complete_weights(path, world, log)


def open_complete_weights(path: Path, world: World, log: Log) -> Source:
    """The complete weights at `path`; the log names others that are skipped. Called by all ranks
    together. Raises `UserError`."""
    source = on_all_ranks(world, lambda: open_complete(path))
    for remark in source.remarks:
        log(remark)
    return source


def _kind(path: Path, world: World) -> Kind:
    """What `path` holds, the same on all ranks. A rank file is seen by the ranks of one disk; where
    rank 0 sees it, the weights are distributed for all. Raises `UserError` where there are none."""
    kind = detect(path)
    if is_rank_folder(path.parent) and world.from_main(path.is_file()):
        kind = "distributed"
    check_same(
        world, {f"weights in {path.name}": Unquoted(kind)},
        rule="all ranks load one form of weights",
        advice="Copy the same folder to every machine",
    )  # fmt: skip
    if kind == "nothing":
        raise no_weights(path)
    check_all_ranks(path)
    return kind


def _open_rank_files(path: Path, world: World, log: Log, strategy: str) -> Source:
    """The source of the save that `path`, a folder of rank folders or a rank file, means."""
    on_all_ranks(world, lambda: check_one_kind(path))
    is_file = is_rank_folder(path.parent) and not path.is_dir()
    root = path.parent.parent if is_file else path
    folder = scan(root, world)
    if is_file:
        candidates = [found for found in folder.candidates if path in found.files]
        return _open_save(path, replace(folder, candidates=candidates), world, log, strategy)
    if folder.candidates or folder.partial_saves:
        return _open_newest(folder, world, log)
    if any(rank_file_paths(root)) and is_unfinished(root, folder.begun):
        raise UserError(
            f"{path} holds rank folders, but no finished checkpoint",
            rule="a save counts when the files of all ranks are written",
            advice="Give another folder",
        )
    return _open_save(path, folder, world, log, strategy)


def _open_newest(folder: Folder, world: World, log: Log) -> Source:
    """The source of the newest valid save that was published in `folder`."""
    warn_skipped(folder, world, log)
    if not folder.candidates:
        raise no_valid_save(folder.root, len(folder.partial_saves))
    candidate, source = latest_valid(
        folder.candidates, world, log, data=False, filesystems=folder.filesystems
    )
    log(f"{folder.root}: checkpoint {candidate.name}")
    return source


def _open_save(path: Path, folder: Folder, world: World, log: Log, strategy: str) -> Source:
    """The source of one save: the published candidate of `folder`, or by the names of files."""
    root, candidates = folder.root, folder.candidates
    if candidates:
        label, files = str(candidates[0].name), candidates[0].rank_files
    else:
        save = on_all_ranks(world, lambda: newest(path) if path.is_dir() else save_of(path))
        label, files = save.label, [RankFile(file) for file in save.in_rank_order]
        manifest = root / MANIFEST_FOLDER / f"{label}.json"
        if world.from_main(manifest.exists()):
            log(f"{manifest} is damaged: the files of {label} are found by their names")
    mark = _layout_mark([file.path for file in files], world)
    strategy_path = Path(strategy) if strategy else None
    open_files = on_all_ranks(world, lambda: rank_file_opener(mark, root, strategy_path, log))
    filesystems = folder.filesystems if candidates and candidates[0].is_spread else ONE_FILESYSTEM
    found = open_valid_ranks(root, files, world, open_files, data=False, filesystems=filesystems)
    if found.source is None:
        raise _not_valid(label, found)
    if mark and not candidates:
        check_unpublished(found.source, world)
    found.report(log)
    log(f"{path}: checkpoint {label}")
    return found.source


def _layout_mark(files: Sequence[Path], world: World) -> str:
    """The layout mark of the first file that the first rank which can read one can read. Called by
    all ranks together."""
    reported, first_error = None, None
    for file in files:
        try:
            reported = layout_mark(file)
            break
        except UserError as error:
            first_error = first_error or error
    answers = world.gather((reported, first_error.problems if first_error else ()))
    for reported, _ in answers:
        if reported is not None:
            return str(reported)
    raise UserError(next(problems for _, problems in answers if problems))


def check_unpublished(source: Source, world: World) -> None:
    """Check rank files without a manifest. One rank reads them; its error is raised on all."""
    problems = None
    if world.is_main:
        try:
            check_copies(source)
        except UserError as error:
            problems = error.problems
    problems = world.from_main(problems)
    if problems:
        raise UserError(problems)


def _not_valid(label: str, found: Found) -> UserError:
    """The error for a save that the user chose and that is not valid."""
    damage = [Problem(what=text, advice="Choose another checkpoint") for text in found.faults]
    return UserError([*damage, *(found.error.problems if found.error else ())])
