"""Opening: the weights a path means, whatever form they have.

Owns which files are read: complete weights, a single file, or the rank files of one save. Of rank
files the newest save counts: by its manifest, and where there is none by the numbers in names. A
rank file stands for its save. Files of MindSpore do not say how they are cut: its strategy files
do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.cleanup import is_unfinished
from launcher.checkpoint.folder import Folder, scan
from launcher.checkpoint.validation import (
    Found,
    RankFile,
    latest_valid,
    no_valid_save,
    open_valid_ranks,
    rank_files_of,
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
    open_complete,
    weights_below,
)


def open_weights(path: Path, world: World, log: Log, *, strategy: str = "") -> Source:
    """The weights at `path`: complete, one file, or rank files. Called by all ranks together.

    `strategy` is where the strategy files lie, for rank files that need them; left out, the folder
    `strategy/` beside the rank files' own. Raises `UserError`.
    """
    kind = _kind(path, world)
    check_same(
        world, {f"weights in {path.name}": Unquoted(kind)},
        rule="all ranks load one form of weights",
        advice="Copy the same folder to every machine",
    )  # fmt: skip
    if kind == "nothing":
        raise UserError(
            f"{path} holds no weights",
            rule="weights are *.safetensors, files of torch, or folders rank_0/, rank_1/, ...",
            nearest=weights_below(path),
            advice="Give a folder or a file of weights",
        )
    check_all_ranks(path)
    if kind != "distributed":
        return open_complete_weights(path, log)
    on_all_ranks(world, lambda: check_one_kind(path))
    is_file = is_rank_folder(path.parent) and not path.is_dir()
    root = path.parent.parent if is_file else path
    folder = scan(root, world)
    candidates = folder.candidates
    if is_file:
        candidates = [found for found in candidates if path in found.files]
    elif candidates or folder.partial_saves:
        warn_skipped(folder, world, log)
        if not candidates:
            raise no_valid_save(root, len(folder.partial_saves))
        candidate, source = latest_valid(
            candidates, world, log, data=False, filesystems=folder.filesystems
        )
        log(f"{path}: checkpoint {candidate.name}")
        return source
    elif any(root.glob("rank*/*.safetensors")) and is_unfinished(root, folder.begun):
        raise UserError(
            f"{path} holds rank folders, but no checkpoint that was finished",
            rule="a save counts when the files of all ranks are written",
            advice="Give another folder",
        )
    return _open_save(path, replace(folder, candidates=candidates), world, log, strategy)


def open_complete_weights(path: Path, log: Log) -> Source:
    """The complete weights at `path`; says which others were passed over. Raises `UserError`."""
    source = open_complete(path)
    for remark in source.remarks:
        log(remark)
    return source


def _kind(path: Path, world: World) -> Kind:
    """What `path` holds; a rank file that rank 0 sees is one of distributed weights for all."""
    kind = detect(path)
    if not is_rank_folder(path.parent):
        return kind
    is_rank_file: bool = world.from_main(path.is_file())
    return "distributed" if is_rank_file else kind


def _open_save(path: Path, folder: Folder, world: World, log: Log, strategy: str) -> Source:
    """The source of one save: a published one, or what the names of files say."""
    root, candidates = folder.root, folder.candidates
    if candidates:
        label, files = str(candidates[0].name), rank_files_of(candidates[0])
    else:
        save = on_all_ranks(world, lambda: newest(path) if path.is_dir() else save_of(path))
        label, files = save.label, [RankFile(file) for file in save.in_rank_order]
        manifest = root / MANIFEST_FOLDER / f"{label}.json"
        if world.from_main(manifest.exists()):
            log(f"{manifest} is damaged: the files of {label} are taken by their names")
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
    """Check files that no manifest vouches for; one rank reads, all hear what it found."""
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
    """What is wrong with a save that the user chose."""
    damage = [Problem(what=text, advice="Choose another checkpoint") for text in found.faults]
    return UserError([*damage, *(found.error.problems if found.error else ())])
